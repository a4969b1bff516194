"""A build by tasks: plan, have an engine do what is missing, join what is done, say what is left."""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from vlm.crashes import crash_point
from vlm.errors import InvalidInput
from vlm.retrieval.durability import WriterLock
from vlm.retrieval.engines.joining import join_finished, report_of_tasks
from vlm.retrieval.engines.tasks import (
    LIST_NAME,
    EmbedOptions,
    Found,
    Task,
    TaskList,
    read_tasks,
    write_tasks,
)
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.planning import plan_sources
from vlm.retrieval.ingest.scanning import Scan, scan_paths, tasks_folder
from vlm.retrieval.reports import Report
from vlm.types import VideoTextEncoder

_ENDED = ".ended-"


class Engine(Protocol):
    """What runs tasks somewhere."""

    def __call__(self, listing: TaskList, missing: Sequence[Task], /) -> str:
        """Have tasks done, and return a sentence on those that are not done yet, empty if all are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a build by tasks has come.

    Attributes:
        report: What became of the files; None while tasks are missing.
        num_done: Tasks that are done and joined.
        num_tasks: All tasks.
        rest: What the engine says about the others.
    """

    report: Report | None
    num_done: int
    num_tasks: int
    rest: str = ""


def build_by_tasks(
    index: VideoIndex,
    paths: Iterable[Path | str],
    engine: Engine,
    model: VideoTextEncoder,
    *,
    options: EmbedOptions,
    files_per_task: int = 64,
    rehash: bool = False,
    first: str | None = None,
) -> Progress:
    """Embed what an index lacks by tasks; run it again and it goes on where it was.

    A list that is there is finished before another is planned.

    Args:
        index: The index.
        paths: Files and folders.
        engine: What runs the tasks.
        model: The index's model.
        options: How the tasks embed.
        files_per_task: Files of a task.
        rehash: As in `VideoIndex.add`.
        first: As in `VideoIndex.add`.

    Raises:
        InvalidInput: A path does not exist; the model is another one, or does not fit the videos.
        BusyError: Somebody else drives a build of this index, or writes it.
        IntegrityError: The list or a part is damaged.
    """
    index.check_model(model)
    started, paths, folder = time.monotonic(), list(paths), tasks_folder(index.folder)
    _sweep(folder)
    tried: set[Path] = set()
    earlier: Report | None = None
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with WriterLock(folder):
            listing = _pending(folder, index, options)
            is_resumed = listing is not None
            if listing is None:
                found, files = _plan(index, scan_paths(paths, index.folder, first), rehash)
                listing = write_tasks(
                    folder,
                    index.manifest,
                    [file for file in files if file not in tried],
                    options=options,
                    roots=[os.path.abspath(path) for path in paths],
                    found=found,
                    files_per_task=files_per_task,
                )
                crash_point("after-task-list")
            progress = _advance(listing, index, engine, started)
            if progress.report is None:
                return progress
            tried = {file for task in listing.tasks for file in task.files()}
            _end(folder)
        if not is_resumed:
            return progress if earlier is None else replace(progress, report=_sum(earlier, progress.report))
        earlier = progress.report


def _sweep(folder: Path) -> None:
    for leftover in folder.parent.glob(f"{glob.escape(folder.name)}{_ENDED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _pending(folder: Path, index: VideoIndex, options: EmbedOptions) -> TaskList | None:
    """Return the list that is there, unless nothing of it was done and it is not what is asked for now."""
    if not (folder / LIST_NAME).exists():
        return None
    listing = read_tasks(folder)
    mine = replace(listing.options, num_workers=options.num_workers, decode_with=options.decode_with)
    if (listing.manifest, mine) == (index.manifest, options):
        return listing
    if len(listing.missing()) == len(listing.tasks):
        return None
    raise InvalidInput(
        f"{folder}: its tasks were planned with other options, and some are done; use the same options, or "
        "delete that folder, and the same command plans anew"
    )


def _plan(index: VideoIndex, scan: Scan, rehash: bool) -> tuple[Found, list[Path]]:
    """Commit what needs no embedding; return its counts, and the other files."""
    with index.writing() as catalog:
        plan = plan_sources(catalog, scan.files, rehash=rehash)
        if plan.changes:
            catalog.commit(plan.changes)
    index.refresh()
    found = Found(
        num_unchanged=plan.num_unchanged, num_renamed=plan.num_renamed, other_files=dict(scan.other_files)
    )
    return found, [source.path for source in plan.new]


def _advance(listing: TaskList, index: VideoIndex, engine: Engine, started: float) -> Progress:
    join_finished(listing, index)
    rest, missing = "", listing.missing()
    if missing:
        rest = engine(listing, missing)
        join_finished(listing, index)
        missing = listing.missing()
    num_tasks = len(listing.tasks)
    report = None if missing else report_of_tasks(listing, time.monotonic() - started)
    return Progress(report=report, num_done=num_tasks - len(missing), num_tasks=num_tasks, rest=rest)


def _end(folder: Path) -> None:
    """Remove a finished list: gone at once, so that no half of it is ever taken for a list."""
    ended = folder.with_name(f"{folder.name}{_ENDED}{os.getpid()}")
    os.replace(folder, ended)
    shutil.rmtree(ended, ignore_errors=True)


def _sum(earlier: Report, later: Report) -> Report:
    """Return the report of both lists; what the first brought in is unchanged to the second."""
    brought = earlier.num_added + earlier.num_updated
    return replace(
        later,
        num_added=earlier.num_added + later.num_added,
        num_updated=earlier.num_updated + later.num_updated,
        num_renamed=earlier.num_renamed + later.num_renamed,
        num_unchanged=max(0, later.num_unchanged - brought),
        num_segments=earlier.num_segments + later.num_segments,
        rejected=(*earlier.rejected, *later.rejected),
        num_on_device=earlier.num_on_device + later.num_on_device,
        fallbacks=dict(Counter(earlier.fallbacks) + Counter(later.fallbacks)),
    )
