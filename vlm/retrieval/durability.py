"""How an index reaches the disk: files that appear whole or not at all, and one writer at a time.

A file is written under a temporary name, synchronised, hashed on the way, and renamed; a crash leaves the
old state or a temporary file that the next writer sweeps.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vlm.crashes import crash_point
from vlm.errors import BusyError, IntegrityError, NoSpaceError

TEMPORARY_PREFIX = ".tmp-"
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HashingWriter:
    """A file that hashes what passes through, so that the hash is of what was meant, not of what is there."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash."""
        self._stream.write(data)
        self.digest.update(data)
        self.size_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def write_durably(path: Path, produce: Callable[[HashingWriter], object]) -> tuple[str, int]:
    """Write a file so that it exists wholly, on the disk, under its final name, or not at all.

    Args:
        path: Final place; replaced if present.
        produce: Writes the content to the object it is given.

    Returns:
        SHA-256 (hex) and size in bytes of the content.

    Raises:
        NoSpaceError: Disk, quota or file-size limit is exhausted; what was there before is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as stream:
            writer = HashingWriter(stream)
            produce(writer)
            crash_point("before-fsync")
            stream.flush()
            os.fsync(stream.fileno())
        crash_point("before-rename")
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _SPACE_ERRORS:
            raise NoSpaceError(
                f"{path}: no space left to write it; the index is unchanged. Free some space and run again"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise IntegrityError(
                f"{path}: the disk cannot keep it ({error.strerror}); the index is unchanged. Check the disk"
            ) from error
        raise
    crash_point("after-rename")
    return writer.digest.hexdigest(), writer.size_bytes


def write_bytes_durably(path: Path, content: bytes) -> tuple[str, int]:
    """Write `content` as `write_durably` does."""
    return write_durably(path, lambda stream: stream.write(content))


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON behind a line with its hash, durably."""
    content = json.dumps(values).encode()
    write_bytes_durably(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote.

    Raises:
        OSError: It cannot be read.
        IntegrityError: It is not what was written.
    """
    digest, _, content = path.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise IntegrityError(f"{path}: its content changed (checksum mismatch)")
    values: dict[str, Any] = json.loads(content)
    return values


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_leftover(entry: Path) -> bool:
    """Whether an entry may lie in a folder where an index is created: what a killed creation leaves."""
    return entry.name == "writer.lock" or entry.name.startswith((TEMPORARY_PREFIX, "catalog."))


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed writer left half-written; only the holder of the lock may call this."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriterLock:
    """The right to write an index; a context manager.

    The kernel's lock says who is alive on this machine, so a killed writer blocks nobody. The file's content
    (pid and host) names the holder, and protects on shared disks where the kernel's lock does not reach.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "writer.lock"
        self._descriptor: int | None = None

    def __enter__(self) -> WriterLock:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            # emptied, not removed: somebody may be waiting on this very file
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        holder = _holder(os.pread(descriptor, 1000, 0))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise BusyError(
                f"{self.path.parent} is being written by process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'this machine')}; wait for it to finish"
            ) from error
        holder = _holder(os.pread(descriptor, 1000, 0))
        if holder and holder.get("host") != socket.gethostname():
            raise BusyError(
                f"{self.path.parent} is marked as being written by process {holder.get('pid')} on "
                f"{holder.get('host')}; if that machine no longer writes, delete {self.path}"
            )
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)


def _holder(content: bytes) -> dict[str, object]:
    try:
        values = json.loads(content or b"{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
