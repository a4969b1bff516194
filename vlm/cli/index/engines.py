"""Build an index by tasks, which other machines may do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.cli.index.upkeep import add_action
from vlm.errors import BusyError, UsageError

if TYPE_CHECKING:
    from vlm.retrieval.engines.driving import Engine
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.reports import Report
    from vlm.types import VideoTextEncoder


def configure_build(build: argparse.ArgumentParser) -> None:
    """Add the flags that choose where a build runs."""
    build.add_argument(
        "--engine",
        choices=("local", "ray", "slurm", "tasks"),
        default="local",
        help="where to embed: here, on a Ray cluster, as a Slurm array, where vlm index task runs (local)",
    )
    build.add_argument(
        "--files-per-task", type=int, default=64, metavar="N", help="files of a task, not with local (64)"
    )
    build.add_argument("--wait", action="store_true", help="with slurm: wait for the job, then join")
    build.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a flag for sbatch, as partition=gpu or gres=gpu:1; may be given more than once",
    )
    build.add_argument("--ray-address", metavar="ADDRESS", help="of the Ray cluster ($RAY_ADDRESS, or here)")


def configure_task(actions: Any) -> None:
    """Add the action that does one task."""
    task = add_action(
        actions, "task", "do tasks of a build by tasks", "vlm index task my-index.tasks --number 7"
    )
    task.add_argument("folder", metavar="INDEX.tasks", help="made by vlm index build")
    task.add_argument("--number", type=int, metavar="N", help="which ($SLURM_ARRAY_TASK_ID)")
    task.add_argument("--step", type=int, metavar="N", help="then do every Nth after it, too")
    task.add_argument("--model", metavar="SOURCE", help="where the index's model lies on this machine")
    task.add_argument("--json", action="store_true", help="print a JSON object")


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise UsageError for flags that the engine does not know."""
    if arguments.files_per_task < 1:
        raise UsageError("--files-per-task must be at least 1")
    if arguments.engine != "slurm" and (arguments.wait or arguments.slurm_option):
        raise UsageError("--wait and --slurm-option go with --engine slurm")
    if arguments.engine != "ray" and arguments.ray_address:
        raise UsageError("--ray-address goes with --engine ray")


def build_elsewhere(
    arguments: argparse.Namespace, index: VideoIndex, model: VideoTextEncoder, options: dict[str, Any]
) -> Report:
    """Do what `vlm index build` does, by tasks.

    Raises:
        BusyError: Tasks are still missing.
    """
    from vlm.retrieval.engines.driving import build_by_tasks
    from vlm.retrieval.engines.tasks import EmbedOptions

    names = ("batch_size", "num_workers", "patience_s", "decode_with", "allow_narrow_model")
    progress = build_by_tasks(
        index,
        arguments.paths,
        _engine(arguments),
        model,
        options=EmbedOptions(**{name: options[name] for name in names}),
        files_per_task=arguments.files_per_task,
        rehash=options["rehash"],
        first=options["first"],
    )
    if progress.report is None:
        raise BusyError(f"{progress.num_done} of {progress.num_tasks} tasks are done; {progress.rest}")
    return progress.report


def run_task(arguments: argparse.Namespace) -> int:
    """Do one task, or every Nth of them."""
    import functools
    import os

    from vlm.cli import index as command
    from vlm.retrieval.engines.tasks import read_tasks
    from vlm.retrieval.engines.working import do_task

    number = arguments.number
    if number is None:
        asked = os.environ.get("SLURM_ARRAY_TASK_ID", "")
        if not asked.isdecimal():
            raise UsageError("--number is needed: $SLURM_ARRAY_TASK_ID is not set to a number")
        number = int(asked)
    if arguments.step is not None and arguments.step < 1:
        raise UsageError("--step must be at least 1")
    listing = read_tasks(Path(arguments.folder))
    last = len(listing.tasks) if arguments.step else number + 1
    source = arguments.model or listing.manifest.model.source
    load = functools.cache(lambda: command.load(source)[0])
    listing.task(number)
    counts = {"num_done": 0, "num_done_before": 0}
    busy: list[BusyError] = []
    for task in listing.tasks[number : last : arguments.step or 1]:
        try:
            counts["num_done" if do_task(listing, task, load) else "num_done_before"] += 1
        except BusyError as error:
            busy.append(error)  # the others need not wait for it
    if arguments.json:
        print(json.dumps({**counts, "num_busy": len(busy)}))
    else:
        print(f"{counts['num_done']} tasks done, {counts['num_done_before']} were done before")
    if busy:
        raise busy[0]
    return 0


def _engine(arguments: argparse.Namespace) -> Engine:
    if arguments.engine == "ray":
        from vlm.retrieval.engines.ray import RayEngine

        return RayEngine(address=arguments.ray_address)
    if arguments.engine == "slurm":
        from vlm.retrieval.engines.slurm import SlurmEngine

        return SlurmEngine(options=tuple(arguments.slurm_option), is_waiting=arguments.wait)
    from vlm.retrieval.engines.tasks import Task, TaskList

    def leave(listing: TaskList, missing: Any) -> str:
        first: Task = missing[0]
        return (
            f"have vlm index task {listing.folder} --number N do the others ({first.number} is the first) "
            "on any machine that sees the same folders, then run the same command again"
        )

    return leave
