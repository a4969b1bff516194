"""Keep an index: verify, repair, compact, export, merge, publish."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import IntegrityError, RejectedItems
from vlm.progress import printable

_MAX_LINES = 20


def configure(actions: Any) -> None:
    """Add the actions and their flags."""
    verify = add_action(actions, "verify", "compare every file with its hash", "vlm index verify my-index")
    verify.add_argument("index", metavar="INDEX")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="make again what can be, take out and name the videos whose vectors are lost",
    )
    compact = add_action(
        actions, "compact", "give back the room of removed videos", "vlm index compact my-index"
    )
    compact.add_argument("index", metavar="INDEX")
    export = add_action(
        actions, "export", "write vectors and segments for other programs", "vlm index export I --out folder"
    )
    export.add_argument("index", metavar="INDEX")
    export.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there yet")
    export.add_argument(
        "--table", choices=("jsonl", "csv", "parquet"), default="jsonl", help="form of the segments (jsonl)"
    )
    merge = add_action(
        actions,
        "merge",
        "put what several indexes hold into one",
        "vlm index merge monday tuesday --out week",
    )
    merge.add_argument("indexes", nargs="+", metavar="INDEX", help="made by one model in one way")
    merge.add_argument("--out", required=True, metavar="INDEX", help="made if it is not there")
    publish = add_action(
        actions,
        "publish",
        "write what servers without the index search (LanceDB)",
        "vlm index publish my-index --to /mnt/shared/store",
    )
    publish.add_argument("index", metavar="INDEX")
    publish.add_argument("--to", required=True, metavar="URI", help="a folder, or s3://... or gs://...")
    publish.add_argument(
        "--group-size", type=int, metavar="N", help="segments in a table (what it has, or 1000000)"
    )
    for action in (verify, compact, export, merge, publish):
        action.add_argument("--json", action="store_true", help="print a JSON object")


def _verify(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.upkeep.repair import repair
    from vlm.retrieval.upkeep.verification import verify_folder

    folder = Path(os.path.abspath(arguments.index))
    if arguments.repair:
        done = repair(folder)
        findings, lost, command = list(done.findings), list(done.lost), done.command
    else:
        findings, lost, command = verify_folder(folder, is_watched=True), [], None
    for finding in findings:
        print(f"{finding.name}: {finding.problem}", file=sys.stderr)
    if arguments.json:
        damaged = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"damaged": damaged, "lost": lost, "command": command}))
    if findings and not arguments.repair:
        raise IntegrityError(
            f"{arguments.index}: {len(findings)} damaged; vlm index verify {arguments.index} --repair mends "
            "what can be mended and names the rest"
        )
    if not arguments.json:
        print("repaired" if findings else "every file is as it was written")
        if lost:
            print_rejected([(path, "damaged", path) for path in lost])
            print(f"{len(lost)} videos have lost their vectors; embed them again: {command}")
    return RejectedItems.exit_code if lost else 0


def _compact(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.upkeep.compaction import compact

    done = compact(VideoIndex.open(arguments.index))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(
            f"dropped {done.num_dropped_rows} segments and {done.num_dropped_generations} generations; "
            f"{done.bytes_before / 2**20:.1f} MiB became {done.bytes_after / 2**20:.1f}"
        )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.upkeep.exporting import export

    metadata = export(VideoIndex.open(arguments.index), arguments.out, arguments.table)
    if arguments.json:
        print(json.dumps(metadata))
    else:
        print(f"{metadata['num_segments']} segments of {metadata['num_videos']} videos in {arguments.out}")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.upkeep.merging import merge

    report = merge(arguments.indexes, arguments.out)
    rejected = [(os.fsdecode(item.path), item.reason, item.detail) for item in report.rejected]
    if arguments.json:
        values = {
            "num_added": report.num_added,
            "num_unchanged": report.num_unchanged,
            "num_segments": report.num_segments,
            "rejected": [dict(zip(("path", "reason", "detail"), item, strict=True)) for item in rejected],
        }
        print(json.dumps(values))
    else:
        print(
            f"{report.num_added} videos added, {report.num_unchanged} were there, {len(rejected)} rejected; "
            f"{report.num_segments} segments in {report.duration_s:.1f} s"
        )
        print_rejected(rejected)
    return RejectedItems.exit_code if rejected else 0


def _publish(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.store.publishing import publish

    done = publish(VideoIndex.open(arguments.index), arguments.to, group_size=arguments.group_size)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(
            f"{arguments.to}: generation {done.generation}, {done.num_videos} videos, {done.num_segments} "
            f"segments in {done.num_groups} groups; {done.num_added} written, {done.num_removed} removed"
        )
    return 0


ACTIONS = {
    "verify": _verify,
    "compact": _compact,
    "export": _export,
    "merge": _merge,
    "publish": _publish,
}


def add_action(actions: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add an action with its one line of help."""
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=summary, description=summary, epilog=f"example: {example}"
    )
    return parser


def print_rejected(rejected: Sequence[tuple[str, str, str]]) -> None:
    """Print (path, reason, detail) of rejected files, escaped, the first twenty."""
    for _, reason, detail in rejected[:_MAX_LINES]:
        print(f"  rejected ({reason}): {printable(detail)}")
    if len(rejected) > _MAX_LINES:
        print(f"  and {len(rejected) - _MAX_LINES} more; vlm index info --json lists them")
