"""What one decoder is ahead of its reader: a queue that holds so many bytes, not so many things."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Lane(Generic[Item]):
    """Items from one thread to another, in order; the sender waits while too many bytes lie there.

    Args:
        most_bytes: What may lie there; one item always may.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: deque[tuple[Item | BaseException, int]] = deque()
        self._held_bytes, self._is_closed = 0, False
        self._changed = threading.Condition()

    def put(self, item: Item, num_bytes: int) -> bool:
        """Add an item, as soon as there is room; False if the lane was closed, where nothing is added."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or not self._held or self._held_bytes + num_bytes <= self._most_bytes
            )
            if not self._is_closed:
                self._append(item, num_bytes)
            return not self._is_closed

    def fail(self, error: BaseException) -> None:
        """Let whoever gets what was put so far get this error next."""
        with self._changed:
            self._append(error, 0)

    def get(self) -> Item:
        """Return the oldest item, as soon as there is one.

        Raises:
            BaseException: What `fail` was given, once all that was put before has been returned.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._held))
            item, num_bytes = self._held.popleft()
            self._held_bytes -= num_bytes
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Let nobody wait for room any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _append(self, item: Item | BaseException, num_bytes: int) -> None:
        self._held.append((item, num_bytes))
        self._held_bytes += num_bytes
        self._changed.notify_all()
