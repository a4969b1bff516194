"""The list of tasks: which files each embeds, and what is done, told by files alone and never by an engine.

``INDEX.tasks/tasks.json`` names the tasks; each has a folder ``NNNNNN-HASH`` with ``task.json`` (its files),
``done.json`` once a complete part exists, and ``joined.json`` once the index holds that part. Every file is
sealed with its own hash and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm.config import build, to_dict
from vlm.errors import IntegrityError, InvalidInput
from vlm.retrieval.durability import read_sealed, write_sealed
from vlm.retrieval.ingest.presence import state_of
from vlm.retrieval.manifest import Manifest

FORMAT = "vlm-tasks/2"
LIST_NAME = "tasks.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOptions:
    """How every task embeds; see `vlm.retrieval.ingest.adding.add_files`."""

    batch_size: int = 8
    num_workers: int = 1
    patience_s: float = 60.0
    decode_with: str = "cpu"
    allow_narrow_model: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the plan says about files that need no embedding; the counts of a `Report`."""

    num_unchanged: int = 0
    num_renamed: int = 0
    other_files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Files that are embedded together into a part of their own.

    Attributes:
        folder: Where everything about it lies.
        number: Its place in the list.
        hash: Of its files (path, size, time) and of everything that decides their vectors.
        num_files: How many files.
    """

    folder: Path
    number: int
    hash: str
    num_files: int

    def files(self) -> list[Path]:
        """Return its files, in order.

        Raises:
            IntegrityError: The file that lists them is gone or not what was written.
        """
        values = _read(self.folder / "task.json")
        if values.get("hash") != self.hash:
            raise IntegrityError(f"{self.folder / 'task.json'}: belongs to another task")
        return [Path(path) for path, _, _ in values["files"]]

    def done(self) -> dict[str, Any] | None:
        """Return what a worker left when its part was complete: ``part`` (below `folder`) and ``digest``."""
        return self._mark("done.json")

    def joined(self) -> dict[str, Any] | None:
        """Return what came of it, once the index holds its part."""
        return self._mark("joined.json")

    def mark(self, name: str, values: Mapping[str, Any]) -> None:
        """Write ``done.json`` or ``joined.json``."""
        write_sealed(self.folder / name, {**values, "hash": self.hash})

    def _mark(self, name: str) -> dict[str, Any] | None:
        try:
            values = read_sealed(self.folder / name)
        except (FileNotFoundError, IntegrityError):
            return None  # without a whole mark it is not done: doing it again does no harm
        return values if values.get("hash") == self.hash else None


@dataclass(frozen=True, kw_only=True)
class TaskList:
    """The tasks of one build.

    Attributes:
        folder: Where it lies.
        manifest: Of the index, and so of every part.
        options: How to embed.
        roots: The files and folders that were asked for.
        found: What else the plan found.
        tasks: In the order in which their parts are joined.
    """

    folder: Path
    manifest: Manifest
    options: EmbedOptions
    roots: tuple[str, ...]
    found: Found
    tasks: tuple[Task, ...]

    @cached_property
    def num_files(self) -> int:
        """Files of all tasks."""
        return sum(task.num_files for task in self.tasks)

    def task(self, number: int) -> Task:
        """Return a task by its number.

        Raises:
            InvalidInput: There is none.
        """
        if not 0 <= number < len(self.tasks):
            raise InvalidInput(f"{self.folder}: has tasks 0 to {len(self.tasks) - 1}, got number {number}")
        return self.tasks[number]

    def missing(self) -> list[Task]:
        """Return the tasks that no worker has done."""
        return [task for task in self.tasks if task.joined() is None and task.done() is None]


def write_tasks(
    folder: Path,
    manifest: Manifest,
    files: Sequence[Path],
    *,
    options: EmbedOptions,
    roots: Sequence[str] = (),
    found: Found | None = None,
    files_per_task: int = 64,
) -> TaskList:
    """Cut files into tasks, in order, and write the list; it exists once its last file does.

    A task that was there already with the same hash keeps what was done of it.

    Raises:
        NoSpaceError: The disk is full; there is no list then.
    """
    found = found or Found()
    decisive = {
        "format": FORMAT,
        "manifest": to_dict(manifest),
        # neither decides a vector
        "options": to_dict(replace(options, num_workers=1, decode_with="cpu")),
    }
    tasks = []
    for number, chunk in enumerate(_chunks(files, files_per_task)):
        # a file that is gone is rejected by the task, saying why
        states = [state_of(path) or (-1, -1) for path in chunk]
        listed = [[str(path), *state] for path, state in zip(chunk, states, strict=True)]
        content = {**decisive, "files": listed}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        task = Task(
            folder=folder / f"{number:06d}-{digest[:16]}", number=number, hash=digest, num_files=len(chunk)
        )
        task.folder.mkdir(parents=True, exist_ok=True)
        task.mark("task.json", {"files": content["files"]})
        tasks.append(task)
    values = {
        "format": FORMAT,
        "manifest": to_dict(manifest),
        "options": to_dict(options),
        "roots": list(roots),
        "found": to_dict(found),
        "tasks": [[task.hash, task.num_files] for task in tasks],
    }
    write_sealed(folder / LIST_NAME, values)
    return TaskList(
        folder=folder,
        manifest=manifest,
        options=options,
        roots=tuple(roots),
        found=found,
        tasks=tuple(tasks),
    )


def read_tasks(folder: Path | str) -> TaskList:
    """Return a list that was written.

    Raises:
        InvalidInput: There is none, or it has another format.
        IntegrityError: It is not what was written.
    """
    folder = Path(os.path.abspath(folder))
    path = folder / LIST_NAME
    if not path.exists():
        raise InvalidInput(
            f"{folder}: holds no list of tasks; vlm index build PATH... --out INDEX --model MODEL "
            "--engine slurm (or ray) makes one as INDEX.tasks"
        )
    values = _read(path)
    if values.get("format") != FORMAT:
        raise InvalidInput(f"{path}: expected format {FORMAT}, got {values.get('format')!r}; plan it anew")
    tasks = [
        Task(folder=folder / f"{number:06d}-{digest[:16]}", number=number, hash=digest, num_files=num_files)
        for number, (digest, num_files) in enumerate(values["tasks"])
    ]
    return TaskList(
        folder=folder,
        manifest=build(Manifest, values["manifest"], where=str(path)),
        options=build(EmbedOptions, values["options"], where=str(path)),
        roots=tuple(values["roots"]),
        found=build(Found, values["found"], where=str(path)),
        tasks=tuple(tasks),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except (IntegrityError, FileNotFoundError) as error:
        raise IntegrityError(
            f"{path}: missing or torn; delete {path.parent if path.name == LIST_NAME else path.parent.parent}"
            f"/{LIST_NAME} and run the same vlm index build again, which plans anew what the index lacks"
        ) from error


def _chunks(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for first in range(0, len(files), size):
        yield files[first : first + size]
