"""Who decodes which piece of which file, and what decoders are ahead of the reader: so many bytes, one order.

A long file is cut into pieces that several decoders work on at once. What they find is read as one decoder
would have found it: file by file, piece by piece.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Segments = list[tuple[float, float]]


@dataclass(eq=False, slots=True)
class Piece(Generic[Item]):
    """Consecutive segments of a file, for one decoder.

    Attributes:
        file: Which one, counted from 0.
        first: Its first segment. The piece that begins with 0 also says what the file is.
        segments: All segments of the file; None before it was opened.
    """

    file: int
    first: int = 0
    segments: Segments | None = None
    held: deque[tuple[Item, int]] = field(default_factory=deque)
    is_ended: bool = False


class Schedule(Generic[Item]):
    """Pieces in the order in which they are read; decoders get the earliest that nobody has.

    Args:
        num_files: Files in all.
        most_bytes: What may wait to be read. Files that come later get half of it, so that those that are
            early never find it full of what is read last; one item of what is being read always may wait.
        piece_segments: Length of a piece; None leaves each file whole.
        most_unopened: Files whose length is not known yet that may be in work at once: a decoder that waits
            for one of them to be opened helps with it then, where it would have begun another.
    """

    def __init__(
        self, num_files: int, most_bytes: int, piece_segments: int | None, most_unopened: int
    ) -> None:
        self._num_files, self._most_bytes = num_files, most_bytes
        self._piece_segments, self._most_unopened = piece_segments, most_unopened
        self._changed = threading.Condition()
        self._pieces: dict[int, list[Piece[Item]]] = {}
        self._free: list[tuple[int, int, Piece[Item]]] = []
        self._next_file = self._num_unopened = self._held_bytes = 0
        self._reading = 0
        self._head: Piece[Item] | None = None
        self._error: BaseException | None = None
        self._is_closed = False

    def take(self) -> Piece[Item] | None:
        """Return the earliest piece that nobody has, as soon as there is one; None if none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._can_take)
            if self._is_over:
                return None
            if self._free:
                return heapq.heappop(self._free)[-1]
            piece: Piece[Item] = Piece(self._next_file)
            self._pieces[piece.file] = [piece]
            self._next_file += 1
            self._num_unopened += 1
            self._changed.notify_all()
            return piece

    def opened(self, piece: Piece[Item], segments: Segments) -> None:
        """Cut a file into pieces, now that its segments are known; `piece` is its first."""
        with self._changed:
            piece.segments = segments
            self._num_unopened -= 1
            length = self._piece_segments or max(1, len(segments))
            for first in range(length, len(segments), length) if piece.file in self._pieces else ():
                more: Piece[Item] = Piece(piece.file, first, segments)
                self._pieces[piece.file].append(more)
                heapq.heappush(self._free, (more.file, more.first, more))
            self._changed.notify_all()

    def put(self, piece: Piece[Item], item: Item, num_bytes: int) -> bool:
        """Add to a piece as soon as there is room; False if nobody will read, now or ever."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(piece, num_bytes))
            if not self._is_closed and piece.file in self._pieces:
                piece.held.append((item, num_bytes))
                self._held_bytes += num_bytes
                self._changed.notify_all()
            return not self._is_closed

    def end(self, piece: Piece[Item]) -> None:
        """Say that a piece is whole, or as whole as it will be."""
        with self._changed:
            piece.is_ended = True
            if piece.segments is None:
                self._num_unopened -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the reader, who would wait for ever, get this error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def read(self, file: int) -> Generator[Item, None, None]:
        """Yield what is found in a file, from the beginning to the end; files are read in order, each once.

        Closing the iterator lets go of the rest of the file.

        Raises:
            BaseException: What `fail` was given.
        """
        with self._changed:
            self._reading = file
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or file in self._pieces)
            if self._error is not None and file not in self._pieces:
                raise self._error
        try:
            # which grows until the first has ended
            for piece in self._pieces[file]:
                yield from self._read(piece)
        finally:
            self._let_go(file)

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _read(self, piece: Piece[Item]) -> Iterator[Item]:
        while True:
            with self._changed:
                self._head = piece
                self._changed.notify_all()
                self._changed.wait_for(lambda: piece.held or piece.is_ended or self._error is not None)
                if not piece.held:
                    if not piece.is_ended:
                        assert self._error is not None
                        raise self._error
                    return
                item, num_bytes = piece.held.popleft()
                self._held_bytes -= num_bytes
                self._changed.notify_all()
            yield item

    def _let_go(self, file: int) -> None:
        with self._changed:
            for piece in self._pieces.pop(file, []):
                self._held_bytes -= sum(num_bytes for _, num_bytes in piece.held)
                piece.held.clear()
            self._free = [free for free in self._free if free[0] != file]
            heapq.heapify(self._free)
            self._changed.notify_all()

    @property
    def _can_take(self) -> bool:
        return bool(self._free) or (
            self._next_file < self._num_files and self._num_unopened < self._most_unopened
        )

    @property
    def _is_over(self) -> bool:
        is_all = self._next_file >= self._num_files and not self._num_unopened and not self._free
        return self._is_closed or self._error is not None or is_all

    def _has_room(self, piece: Piece[Item], num_bytes: int) -> bool:
        if piece.file not in self._pieces or (piece is self._head and not piece.held):
            return True
        share = 1 if piece.file <= self._reading else 2
        return not self._held_bytes or self._held_bytes + num_bytes <= self._most_bytes // share
