"""Bounded concurrency: so many calls at once, so many in line, and everybody else is told to come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vlm.errors import BusyError

Result = TypeVar("Result")


class Gate:
    """Runs calls in threads of its own.

    A call that has begun cannot be stopped, so it keeps its place when its caller gives up: what is slow
    then sheds load instead of piling up.

    Args:
        name: For metrics and messages.
        num_running: Calls at the same time.
        max_waiting: Calls in line.
        timeout_s: Longest time from asking to answer.
    """

    def __init__(self, name: str, num_running: int, max_waiting: int, timeout_s: float) -> None:
        self.name, self._capacity, self._timeout_s = name, num_running + max_waiting, timeout_s
        self._executor = ThreadPoolExecutor(num_running, thread_name_prefix=f"vlm-{name}")
        self._lock = threading.Lock()
        self._depth = 0

    @property
    def depth(self) -> int:
        """Calls that are running or in line."""
        return self._depth

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return what the function returns.

        Raises:
            BusyError: There is no place in line, or the answer took too long.
        """
        with self._lock:
            if self._depth >= self._capacity:
                raise BusyError(f"the server is busy ({self._depth} requests for {self.name}); try again")
            self._depth += 1
        try:
            future: Future[Result] = self._executor.submit(function, *arguments)
        except RuntimeError as error:
            self._leave()
            raise BusyError("the server is shutting down") from error
        future.add_done_callback(lambda _: self._leave())
        answer = asyncio.wrap_future(future)
        # an error that comes after its caller has left is nobody's
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(answer)
        except TimeoutError as error:
            raise BusyError(f"{self.name} took longer than {self._timeout_s:g} s; try again") from error
        finally:
            future.cancel()

    def close(self) -> None:
        """Forget what is in line and take no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _leave(self) -> None:
        with self._lock:
            self._depth -= 1
