"""Bounded concurrency: so many calls at once, so many in line, and everybody else is told to come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vlm.errors import BusyError

Result = TypeVar("Result")

# the newest of so many intervals is what the pace is made of
_PACE_OF = 8
# so many may wait however slow the calls are, or two people who ask for long work could not do it in turn
_ALWAYS_WAITING = 4


class Gate:
    """Runs calls in threads of its own.

    A call that has begun cannot be stopped, so it keeps its place when its caller gives up: what is slow
    then sheds load instead of piling up. The line is as long as can be answered in time at the pace at which
    calls have ended lately, so it is gone as soon after an overload.

    Args:
        name: For metrics and messages.
        num_running: Calls at the same time.
        max_waiting: Calls in line.
        timeout_s: Longest time from asking to answer.
        max_wait_s: Who must expect a longer one is refused; if None, everybody waits who has a place.
        clock: Tells seconds that only ever grow.
    """

    def __init__(
        self,
        name: str,
        num_running: int,
        max_waiting: int,
        timeout_s: float,
        max_wait_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._capacity, self._timeout_s = name, num_running + max_waiting, timeout_s
        self._free, self._max_wait_s, self._clock = num_running + _ALWAYS_WAITING, max_wait_s, clock
        self._pace_s, self._ended_s = 0.0, 0.0
        self._own = threading.local()
        self._executor = ThreadPoolExecutor(
            num_running, f"vlm-{name}", initializer=lambda: setattr(self._own, "is_here", True)
        )
        self._lock = threading.Lock()
        self._depth = 0

    @property
    def depth(self) -> int:
        """Calls that are running or in line."""
        return self._depth

    @property
    def expected_s(self) -> float:
        """How long a call that came now would take to be answered, at the pace of the last ones."""
        return (self._depth + 1) * self._pace_s

    def check(self) -> None:
        """Raise BusyError if a call that came now would have no place in line, or wait too long."""
        if self._depth >= self._capacity:
            raise BusyError(f"the server is busy ({self._depth} requests for {self.name}); try again")
        if self._max_wait_s is None or self._depth < self._free or self.expected_s <= self._max_wait_s:
            return
        raise BusyError(f"the server is busy ({self.name} would take {self.expected_s:.1f} s); try again")

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return what the function returns.

        Raises:
            BusyError: There is no place in line, the wait would be too long, or the answer took too long.
        """
        future = self._submit(True, function, *arguments)
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

    def run_within(self, function: Callable[[], Result]) -> Result:
        """Return what the function returns, for a call that was let in elsewhere: it is not refused here.

        Called in a thread of another gate, which waits; in one of its own it runs at once.

        Raises:
            BusyError: It took too long, or the server is shutting down.
        """
        if getattr(self._own, "is_here", False):
            return function()
        future = self._submit(False, function)
        try:
            return future.result(self._timeout_s)
        except CancelledError as error:
            raise BusyError("the server is shutting down") from error
        except TimeoutError as error:
            if future.done():  # the function's own
                raise
            future.cancel()
            raise BusyError(f"{self.name} took longer than {self._timeout_s:g} s; try again") from error

    def _submit(self, may_refuse: bool, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        with self._lock:
            if may_refuse:
                self.check()
            if not self._depth:
                self._ended_s = self._clock()
            self._depth += 1
        try:
            future = self._executor.submit(function, *arguments)
        except RuntimeError as error:
            self._leave(None)
            raise BusyError("the server is shutting down") from error
        future.add_done_callback(self._leave)
        return future

    def close(self) -> None:
        """Forget what is in line and take no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _leave(self, call: Future[Any] | None) -> None:
        with self._lock:
            self._depth -= 1
            # who gave up in line says nothing of the pace
            if call is None or call.cancelled():
                return
            now = self._clock()
            self._pace_s += (now - self._ended_s - self._pace_s) / _PACE_OF
            self._ended_s = now
