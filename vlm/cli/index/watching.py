"""Watch folders and keep an index in line with them, at low priority."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from vlm.cli.index.upkeep import add_action
from vlm.errors import RejectedItems, UsageError

_NICENESS = 10


def configure(actions: Any) -> argparse.ArgumentParser:
    """Add the action with the flags that no other has; return its parser."""
    parser = add_action(
        actions, "watch", "keep it in line with folders, at low priority", "vlm index watch my-index ~/Videos"
    )
    parser.add_argument("index", metavar="INDEX")
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="folders and files besides those that were ever added"
    )
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between two looks (60)")
    parser.add_argument("--once", action="store_true", help="do one round and end, as cron needs it")
    parser.add_argument(
        "--settle",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="between the first two looks: a file that changes meanwhile is still being written (5)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the encoder (1)")
    parser.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
    parser.set_defaults(workers=1, rehash=False, first=None)
    return parser


def run_watch(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Watch until interrupted, or do one round; 3 if that rejected some files."""
    if not arguments.every > 0 or not arguments.settle >= 0:
        raise UsageError("--every must be above 0 seconds, and --settle not below")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError("--threads must be at least 1")
    # read when torch is loaded, which is later
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.nice(_NICENESS)
    from vlm.cli import index as command
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.ingest.watching import Watcher
    from vlm.retrieval.reports import Report

    index = VideoIndex.open(arguments.index)
    watcher = Watcher(
        index,
        lambda: command.load(arguments.model or index.manifest.model.source)[0],
        arguments.paths,
        say=_say,
        **{name: value for name, value in options.items() if name not in ("rehash", "first")},
    )

    def done(report: Report) -> None:
        command.print_report(index, report, arguments.json)
        sys.stdout.flush()

    if not arguments.once:
        watcher.load_model()  # what is wrong with it is said now, not when a file comes
        watcher.run(done, every_s=arguments.every, settle_s=arguments.settle)
    report = watcher.once(arguments.settle)
    if arguments.json or report != Report():
        done(report)
    return RejectedItems.exit_code if report.rejected else 0


def _say(line: str) -> None:
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    print(f"vlm: {text}", file=sys.stderr, flush=True)
