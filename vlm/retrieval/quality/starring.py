"""Rows added to a file of known items while people edit it, too."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlm.errors import BusyError, InvalidInput, VlmError
from vlm.retrieval.catalog import VideoRow
from vlm.retrieval.durability import write_bytes_durably
from vlm.retrieval.quality.known_items import KnownItem, find_videos, format_known_items, parse_known_items

_MARK = b"\xef\xbb\xbf"


class KnownItemFile:
    """A file of known items, read afresh for every question: whoever edits it by hand is respected.

    Changes are made by one at a time, of this process and others, and replace the file whole. What is no such
    file is never overwritten. Its methods raise InvalidInput for a file that is malformed, BusyError if it
    changed in between, and VlmError where it cannot be read or written.

    Args:
        path: The file; it need not exist.
        most_rows: How many rows it may grow to.
    """

    def __init__(self, path: Path, most_rows: int) -> None:
        self.path, self.most_rows = Path(os.path.realpath(path)), most_rows
        self._changing = threading.Lock()

    def read(self) -> list[KnownItem]:
        """Return the rows; none if there is no file."""
        return self._parsed(self._content())

    def add(
        self, query: str, video: VideoRow, start_s: float, end_s: float, videos: Sequence[VideoRow]
    ) -> KnownItem:
        """Append a row, unless the same is there, and return it.

        Args:
            query: The text.
            video: What it should find.
            start_s: Where the moment begins, in seconds.
            end_s: Where it ends.
            videos: Those of the index, to recognise videos that rows name in other ways.

        Raises:
            InvalidInput: The file is full.
        """
        with self._held():
            content = self._content()
            items = self._parsed(content)
            targets = find_videos(items, videos, self.path.parent)
            for item, target in zip(items, targets, strict=True):
                if (item.query, target, item.start_s, item.end_s) == (query, video.video_id, start_s, end_s):
                    return item
            if len(items) >= self.most_rows:
                raise InvalidInput(f"{self.path}: holds {len(items):,} queries, the most that it may grow to")
            item = KnownItem(query=query, video=_name(video), start_s=start_s, end_s=end_s)
            self._write([*items, item], content)
            return item

    def remove(self, key: str) -> KnownItem | None:
        """Take out the row that `key_of` names; return it, or None if there is none."""
        with self._held():
            content = self._content()
            items = self._parsed(content)
            found = next((item for item in items if key_of(item) == key), None)
            if found is not None:
                self._write([item for item in items if item != found], content)
            return found

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise VlmError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _parsed(self, content: bytes) -> list[KnownItem]:
        return parse_known_items(content, self.path) if content else []

    def _write(self, items: Sequence[KnownItem], before: bytes) -> None:
        if self._content() != before:
            raise BusyError(f"{self.path}: was changed just now; try again")
        # a spreadsheet that put its mark there wants it back
        mark = _MARK if before.startswith(_MARK) else b""
        write_bytes_durably(self.path, mark + format_known_items(items))

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep out other threads, and other processes by a lock on the folder: no file stays."""
        with self._changing:
            try:
                descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    yield
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise VlmError(f"{self.path}: cannot be written ({error.strerror})") from error


def key_of(item: KnownItem) -> str:
    """Return a name for a row that changes with its content only."""
    content = json.dumps([item.query, item.video, item.start_s, item.end_s]).encode()
    return hashlib.sha256(content).hexdigest()[:32]


def _name(video: VideoRow) -> str:
    """Return how a row names a video: by its path, or by its identifier where a path is no plain text."""
    path = os.fsdecode(video.path)
    return path if path.isprintable() and path == path.strip() else video.video_id
