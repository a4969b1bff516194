"""Files that can be made again, kept up to so many bytes; the least recently used go first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import NoSpaceError

_TEMPORARY = ".tmp-"
_MAKER = re.compile(r"\.tmp-(\d{1,9})-", re.ASCII)
_ABANDONED_S = 3600.0
_MANY = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A kept file, its name in the cache, and what its maker said about it."""

    name: str
    path: Path
    facts: dict[str, Any]


class FileCache:
    """A folder of made files, which several processes may share.

    Args:
        folder: Made if it does not exist; what processes that ended were making there is removed.
        max_bytes: How much to keep; a single larger file is kept until the next comes.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            if _is_abandoned(leftover):
                leftover.unlink(missing_ok=True)
        # in two containers two servers can have the same number
        self._own = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-"
        self._lock = threading.Lock()
        self._makers = [threading.Lock() for _ in range(_MANY)]
        self._size = sum(_size(path) for path in folder.iterdir())

    @property
    def size_bytes(self) -> int:
        """Bytes that are kept."""
        return self._size

    def get(self, name: str) -> Entry | None:
        """Return a kept file by its name in the cache."""
        path = self.folder / name
        try:
            facts = json.loads((self.folder / f"{name}.json").read_bytes())
            os.utime(path)
        except (OSError, ValueError):
            return None
        return Entry(name=name, path=path, facts=facts)

    def find(self, what: tuple[object, ...], suffix: str) -> Entry | None:
        """Return the file for `what`, if it was made."""
        return self.get(_name(what, suffix))

    def make(self, what: tuple[object, ...], suffix: str, produce: Callable[[Path], dict[str, Any]]) -> Entry:
        """Return the file for `what`; `produce` writes it, and returns facts about it, if it is not there.

        Of several calls for the same file one makes it, and the others wait for that.
        """
        name = _name(what, suffix)
        with self._makers[int(name[:8], 16) % _MANY]:
            if (entry := self.get(name)) is not None:
                return entry
            temporary = self.folder / f"{self._own}{name}"
            described = self.folder / f"{self._own}{name}.json"
            try:
                facts = produce(temporary)
                temporary.replace(self.folder / name)
                # what it is comes last: without it the file does not count
                described.write_text(json.dumps(facts))
                added = _size(self.folder / name) + _size(described)
                described.replace(self.folder / f"{name}.json")
            except OSError as error:
                raise NoSpaceError(f"{self.folder}: cannot be written ({error.strerror})") from error
            finally:
                temporary.unlink(missing_ok=True)
                described.unlink(missing_ok=True)
        with self._lock:
            self._size += added
            if self._size > self._max_bytes:
                self._evict(keep=name)
        return Entry(name=name, path=self.folder / name, facts=facts)

    def _evict(self, keep: str) -> None:
        """Remove the oldest down to nine tenths; whoever has one open reads on."""
        files = [path for path in self.folder.iterdir() if not path.name.startswith((_TEMPORARY, keep))]
        aged = sorted((_used(path), path) for path in files if path.suffix != ".json")
        self._size = sum(_size(path) for path in self.folder.iterdir())
        for _, path in aged:
            if self._size <= self._max_bytes * 0.9:
                return
            for file in (path, path.with_name(f"{path.name}.json")):
                self._size -= _size(file)
                file.unlink(missing_ok=True)


def _name(what: tuple[object, ...], suffix: str) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32] + suffix


def _is_abandoned(path: Path) -> bool:
    """Whether nobody makes this file any more: who did has ended, or has not written for an hour."""
    found = _MAKER.match(path.name)
    if found is not None:
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's
            pass
    return time.time() - _used(path) > _ABANDONED_S


def _size(path: Path) -> int:
    with suppress(OSError):
        found = path.stat()
        return max(found.st_size, 512 * found.st_blocks)  # small files take whole blocks
    return 0


def _used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
