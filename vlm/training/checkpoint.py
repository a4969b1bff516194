"""Checkpoints that survive a kill or a full disk at any byte: written aside, hashed, then renamed.

``RUN/checkpoints/step-00000100/`` appears complete or not at all; ``latest`` names the newest. A run has one
writer at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlm import distributed
from vlm.crashes import crash_point
from vlm.errors import BusyError, IntegrityError

MANIFEST = "manifest.json"
FORMAT = "vlm-checkpoint/1"
_LATEST = "latest"
_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: ``RUN/checkpoints``; created when the first one is saved.
        keep: How many of the newest stay; at least 2, so that a damaged newest one has a predecessor.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"checkpoint.keep must be at least 2, got {keep}")
        self.folder = folder
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None], facts: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint; every process calls this and ``write``, process 0 commits.

        Args:
            step: Number of updates done.
            write: Fills the folder that it is given.
            facts: Goes into the manifest.

        Raises:
            OSError: A file cannot be written; the checkpoints before stay as they were.
        """
        final = self.folder / f"step-{step:08d}"
        aside = final.with_suffix(".tmp")
        together(lambda: self._prepare(aside))
        write_error: Exception | None = None
        try:
            write(aside)
        except Exception as error:
            write_error = error
        # no process may wait for one that failed
        first = next((error for error in distributed.gather_objects(write_error) if error is not None), None)
        if first is not None:
            if distributed.is_main():
                shutil.rmtree(aside, ignore_errors=True)
            raise first
        together(lambda: self._commit(aside, final, {"step": step, **(facts or {})}))
        return final

    def latest(self) -> Path | None:
        """Return the newest undamaged checkpoint, naming damaged ones in a warning; None if there is none.

        Raises:
            IntegrityError: Checkpoints exist, but all are damaged.
        """
        problems = []
        for folder in reversed(self.list()):
            try:
                verify(folder)
            except IntegrityError as error:
                problems.append(str(error))
                _log.warning("%s; trying the checkpoint before it", error)
                continue
            return folder
        if problems:
            raise IntegrityError(f"no usable checkpoint in {self.folder}: {'; '.join(problems)}")
        return None

    def list(self) -> list[Path]:
        """Return the committed checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir() and path.suffix != ".tmp"]
        return sorted(found)

    def sweep(self) -> None:
        """Remove what a kill left half written or half deleted, and what is beyond ``keep``."""
        self._remove_partial()
        self._rotate()

    def _prepare(self, aside: Path) -> None:
        self._remove_partial()
        aside.mkdir(parents=True)
        crash_point("checkpoint-begun")

    def _commit(self, aside: Path, final: Path, facts: dict[str, Any]) -> None:
        crash_point("checkpoint-written")
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        entries = {}
        for path in files:
            sync(path)
            entries[path.relative_to(aside).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": file_hash(path),
            }
        for folder in (path for path in aside.rglob("*") if path.is_dir()):
            sync(folder)
        crash_point("checkpoint-hashed")
        manifest = {"format": FORMAT, **facts, "files": entries}
        write_durably(aside / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
        sync(aside)
        crash_point("checkpoint-before-rename")
        if final.exists():  # a resumed run repeats a step whose checkpoint was found damaged
            shutil.rmtree(final)
        os.rename(aside, final)
        sync(self.folder)
        crash_point("checkpoint-after-rename")
        replace_durably(self.folder / _LATEST, final.name.encode())
        crash_point("checkpoint-marked")
        self._rotate()

    def _remove_partial(self) -> None:
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)

    def _rotate(self) -> None:
        for old in self.list()[: -self.keep]:
            aside = old.with_suffix(".tmp")  # half deleted it must not pass for a checkpoint
            old.rename(aside)
            crash_point("checkpoint-in-rotation")
            shutil.rmtree(aside)


def together(action: Callable[[], None]) -> None:
    """Run ``action`` in process 0 and raise its error in every process."""
    problem: Exception | None = None
    if distributed.is_main():
        try:
            action()
        except Exception as error:
            problem = error
    problem = distributed.broadcast_object(problem)
    if problem is not None:
        raise problem


@contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, which is made; every process calls this.

    The system lets go of the lock when process 0 ends, however it does.

    Raises:
        BusyError: A process that was started before still writes there.
    """
    held: list[int] = []

    def take() -> None:
        run.mkdir(parents=True, exist_ok=True)
        held.append(os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{run} is being written by another process; wait for it, or stop it") from error

    try:
        together(take)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every file's size and hash.

    Raises:
        IntegrityError: The manifest or a file is missing, torn or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"]
        if manifest["format"] != FORMAT:
            raise IntegrityError(f"{folder}: expected format {FORMAT}, got {manifest['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder}: {MANIFEST} is missing or damaged ({error})") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{folder}: {name} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise IntegrityError(f"{folder}: {name} has {size} bytes, expected {entry['bytes']}")
        if file_hash(path) != entry["sha256"]:
            raise IntegrityError(f"{folder}: {name} does not match its checksum")
    return manifest


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write plain containers of tensors durably.

    Serialised in memory first: a full disk then raises Python's OSError, which the command line understands.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_durably(path, buffer.getbuffer())


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save_tensors`` wrote; nothing in the file is executed."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is there as it was, or as it shall be, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_durably(temporary, content)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
