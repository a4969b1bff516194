"""One task, done by one worker: its files become a small index, complete before it is called done."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vlm.crashes import crash_point
from vlm.errors import IntegrityError
from vlm.retrieval.durability import WriterLock
from vlm.retrieval.engines.tasks import Task, TaskList
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.adding import add_files
from vlm.types import VideoTextEncoder

Loader = Callable[[], VideoTextEncoder]


def do_task(listing: TaskList, task: Task, load: Loader) -> bool:
    """Embed a task's files unless that is done; a task that was interrupted on this machine goes on.

    Every machine has a part of its own in the task's folder, so that a dead one holds up nobody, and two that
    do the same task at once both end with a complete part, of which either serves.

    Args:
        listing: The list that it belongs to.
        task: Which.
        load: Gives the model, called only if there is something to embed.

    Returns:
        Whether there was something to do.

    Raises:
        BusyError: Another process of this machine is doing it.
        InvalidInput: The model is another one, or a video is not of its domain.
        IntegrityError: The task's list of files is damaged.
        NoSpaceError: The disk is full.
    """
    if task.done() is not None or task.joined() is not None:
        return False
    files = task.files()
    place = task.folder / socket.gethostname()
    place.mkdir(exist_ok=True)
    with WriterLock(place):
        if task.done() is not None:
            return False
        part = _open_part(place / "part", listing)
        model = load()
        part.check_model(model)
        with part.writing() as catalog:
            options = listing.options
            outcome, _ = add_files(
                catalog,
                part.log,
                part.manifest,
                model,
                files,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                patience_s=options.patience_s,
                decode_with=options.decode_with,
                allow_narrow_model=options.allow_narrow_model,
            )
        crash_point("before-task-done")
        generation = part.refresh().generation
        where = str(part.folder.relative_to(task.folder))
        # of this run alone: what one before it did, before it was interrupted, is not known any more
        decoded = {"num_on_device": outcome.num_on_device, "fallbacks": dict(outcome.fallbacks)}
        task.mark("done.json", {"part": where, "digest": generation.digest, "decoded": decoded})
    return True


def discard(task: Task) -> None:
    """Forget what was done of a task; it can be done again."""
    (task.folder / "done.json").unlink(missing_ok=True)
    for entry in task.folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def _open_part(folder: Path, listing: TaskList) -> VideoIndex:
    if (folder / "manifest.json").exists():
        with suppress(IntegrityError):
            return VideoIndex.open(folder)
        shutil.rmtree(folder)  # nothing of a damaged part is worth a search for what is whole
    return VideoIndex.create_for(folder, listing.manifest)
