"""Shards that lie elsewhere: fetched whole on first use into a local cache of bounded size, and verified."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.assets import user_folder
from vlm.errors import DataError, InvalidInput, MissingExtra

# protocol → (extra, package that it needs beside fsspec); nothing that runs programs or opens local files
_PROTOCOLS = {
    "http": ("remote", "aiohttp"),
    "https": ("remote", "aiohttp"),
    "s3": ("s3", "s3fs"),
    "gs": ("gs", "gcsfs"),
    "gcs": ("gs", "gcsfs"),
    "memory": ("remote", "fsspec"),
}
_CHUNK = 4 << 20
_TRIES, _FIRST_WAIT_S = 4, 0.5
_MAX_MANIFEST = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where fetched shards are kept.

    Attributes:
        folder: None for ``shards`` in the user's folder of vlm (``VLM_HOME``).
        max_bytes: What all shards in it may take together; those unused for longest go first. Shuffling reads
            from 16 shards at a time: less than that fetches them again and again.
    """

    folder: Path | None = None
    max_bytes: int = 64 << 30

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {self.max_bytes}")


def is_remote(folder: Path | str) -> bool:
    """Whether the folder is named by a URL."""
    return isinstance(folder, str) and "://" in folder


class RemoteFolder:
    """A folder of shards behind a URL; usable from many threads and processes with one cache.

    Raises:
        InvalidInput: The protocol is none of ``http(s)``, ``s3``, ``gs``; the URL holds a query or a chain.
        MissingExtra: fsspec, or what it needs for the protocol, is not installed.
    """

    def __init__(self, url: str, cache: CacheConfig) -> None:
        protocol = url.partition("://")[0].lower()
        if protocol not in _PROTOCOLS or "::" in url or "?" in url or "#" in url:
            raise InvalidInput(
                f"{shown(url)}: expected a folder at {', '.join(name + '://' for name in _PROTOCOLS)}"
            )
        self._url, self._protocol, self._max_bytes = url.rstrip("/"), protocol, cache.max_bytes
        self._root = cache.folder or user_folder() / "shards"
        self.folder = self._root / hashlib.sha256(self._url.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = _filesystem(protocol)

    def refresh(self, name: str) -> None:
        """Fetch a small file anew, whatever the cache holds.

        Raises:
            DataError: ``no_manifest`` if it is not there; ``remote_unreachable``.
        """
        try:
            self._fetch(name, None, _MAX_MANIFEST)
        except FileNotFoundError as error:
            raise DataError(f"{shown(self._url)}: holds no {name}", "no_manifest") from error

    def local(self, name: str, sha256: str, size: int | None = None) -> Path:
        """Return the verified local copy of a file, fetching it if the cache does not hold it.

        Raises:
            DataError: ``shard_missing``, ``remote_unreachable``, ``checksum``, ``cache_too_small``.
        """
        path = self.folder / name
        if not _has(path, size):
            with self._locked(name):
                if not _has(path, size):
                    self._make_room(size or 0)
                    try:
                        self._fetch(name, sha256, _MAX_MANIFEST if size is None else size)
                    except FileNotFoundError as error:
                        raise DataError(f"{shown(self._url)}/{name}: not there", "shard_missing") from error
        try:
            now = time.time_ns()  # finer than the clock of the file system
            os.utime(path, ns=(now, now))  # the last use decides who goes first
        except FileNotFoundError:
            return self.local(name, sha256, size)  # another process made room just now
        return path

    def open(self, name: str, sha256: str, size: int) -> int:
        """Return a descriptor of the verified local copy, which stays readable when others make room.

        Raises:
            DataError: See `local`.
        """
        while True:
            try:
                return os.open(self.local(name, sha256, size), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it left the cache just now

    def forget(self, name: str) -> None:
        """Remove a local copy that turned out damaged."""
        (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, name: str, sha256: str | None, most: int) -> None:
        """Fetch to a temporary name, verify, rename; try again after failures of the network."""
        target = self.folder / name
        temporary = target.with_name(f".{name}.{os.getpid()}.tmp")
        wait_s = _FIRST_WAIT_S
        try:
            for attempt in range(1, _TRIES + 1):
                try:
                    found = self._download(f"{self._url}/{name}", temporary, most)
                    if sha256 is not None and found != sha256:
                        raise DataError(f"{shown(self._url)}/{name}: its hash is another", "checksum")
                    os.replace(temporary, target)
                    return
                except FileNotFoundError:
                    raise
                except DataError:
                    if attempt == _TRIES:
                        raise
                except Exception as error:  # every file system of fsspec has errors of its own
                    if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
                        raise
                    if attempt == _TRIES:
                        raise DataError(
                            f"{shown(self._url)}/{name}: cannot be fetched: {type(error).__name__}",
                            "remote_unreachable",
                        ) from error
                time.sleep(wait_s)
                wait_s *= 2
        finally:
            temporary.unlink(missing_ok=True)

    def _download(self, url: str, temporary: Path, most: int) -> str:
        """Return the SHA-256 of what came; nothing larger than ``most`` is taken."""
        options = {"block_size": 0} if self._protocol in ("http", "https") else {}  # stream, no ranges needed
        digest, size = hashlib.sha256(), 0
        with self._files.open(url, "rb", **options) as source, temporary.open("wb") as stream:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > most:
                    raise DataError(
                        f"{shown(url)}: larger than the {most} bytes that are expected", "checksum"
                    )
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        return digest.hexdigest()

    def _make_room(self, size: int) -> None:
        if size > self._max_bytes:
            raise DataError(
                f"{self._root}: a shard of {size} bytes exceeds the cache of {self._max_bytes}; "
                "raise cache_gb",
                "cache_too_small",
            )
        held = []
        for path in self._root.glob("*/*.tar"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            held.append((found.st_mtime, found.st_size, path))
        total = sum(length for _, length, _ in held)
        for _, length, path in sorted(held):
            if total + size <= self._max_bytes:
                return
            path.unlink(missing_ok=True)  # who has it open reads on
            total -= length

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Let one process fetch a file while the others wait for it."""
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def shown(url: str) -> str:
    """Return the URL without a user's name and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def _has(path: Path, size: int | None) -> bool:
    try:
        return size is None and path.is_file() or path.stat().st_size == size
    except FileNotFoundError:
        return False


def _filesystem(protocol: str) -> Any:
    purpose = f"reading shards from {protocol}://"
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtra("fsspec", "remote", purpose) from error
    extra, package = _PROTOCOLS[protocol]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise MissingExtra(package, extra, purpose) from error
