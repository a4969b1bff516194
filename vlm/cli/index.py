"""Make and keep a searchable index of videos."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import InvalidInput, RejectedItems, UsageError

if TYPE_CHECKING:
    from vlm.retrieval.index import Report, VideoIndex
    from vlm.types import VideoTextEncoder

EXAMPLE = "vlm index build ~/Videos --out my-index --model videomamba-m-25m"
_MAX_LINES = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = _action(actions, "build", "index videos; run it again to go on or to add", EXAMPLE)
    build.add_argument("paths", nargs="+", metavar="PATH", help="video files and folders")
    build.add_argument("--out", required=True, metavar="INDEX", help="the index folder")
    build.add_argument(
        "--model", required=True, metavar="SOURCE", help="a name of 'vlm models list' or a path"
    )
    build.add_argument("--segment-seconds", type=float, default=8.0, help="length of a segment (8)")
    build.add_argument("--stride-seconds", type=float, default=4.0, help="from one start to the next (4)")
    build.add_argument(
        "--store-tokens",
        choices=("none", "pooled", "full"),
        help="features kept for reranking (pooled if the model can rerank)",
    )
    _add_embedding_flags(build)
    add = _action(actions, "add", "index more videos", "vlm index add my-index new-clips")
    add.add_argument("index", metavar="INDEX")
    add.add_argument("paths", nargs="+", metavar="PATH", help="video files and folders")
    update = _action(
        actions, "update", "bring in what is new or changed, drop what is gone", "vlm index update I"
    )
    update.add_argument("index", metavar="INDEX")
    for action in (add, update):
        action.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
        _add_embedding_flags(action)
    remove = _action(
        actions, "remove", "take videos out; their files stay", "vlm index remove my-index holiday.mp4"
    )
    remove.add_argument("index", metavar="INDEX")
    remove.add_argument("videos", nargs="+", metavar="VIDEO", help="identifiers or paths")
    remove.add_argument("--json", action="store_true", help="print a JSON object")
    info = _action(actions, "info", "say what an index holds", "vlm index info my-index --json")
    verify = _action(actions, "verify", "compare every file with its hash", "vlm index verify my-index")
    for action in (info, verify):
        action.add_argument("index", metavar="INDEX")
        action.add_argument("--json", action="store_true", help="print a JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Do one action and return its exit code."""
    return {
        "build": _build,
        "add": _add,
        "update": _update,
        "remove": _remove,
        "info": _info,
        "verify": _verify,
    }[arguments.action](arguments)


def _action(actions: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=summary, description=summary, epilog=f"example: {example}"
    )
    return parser


def _add_embedding_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="segments encoded at once (8)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="longest wait for one segment of a file (60)",
    )
    parser.add_argument(
        "--allow-demo-model",
        action="store_true",
        help="index ordinary videos with a model that does not know them; hits carry a warning",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _build(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    options = _options(arguments)
    _need_videos(arguments.paths, arguments.out)
    model, source = load(arguments.model)
    is_new = not (Path(arguments.out) / "manifest.json").exists()
    if is_new:
        index = VideoIndex.create(
            arguments.out,
            model,
            source=source,
            segment_s=arguments.segment_seconds,
            stride_s=arguments.stride_seconds,
            store_tokens=arguments.store_tokens,
        )
    else:
        index = VideoIndex.open(arguments.out)
        _check_settings(index, arguments)
    try:
        report = index.add(arguments.paths, model=model, **options)
    except InvalidInput:
        if is_new:
            index.discard_if_empty()
        raise
    return _conclude(index, report, arguments.json)


def _add(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    options = _options(arguments)
    _need_videos(arguments.paths, arguments.index)
    index = VideoIndex.open(arguments.index)
    model, _ = load(arguments.model or index.manifest.model.source)
    return _conclude(index, index.add(arguments.paths, model=model, **options), arguments.json)


def _update(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    options = _options(arguments)
    index = VideoIndex.open(arguments.index)
    model, _ = load(arguments.model or index.manifest.model.source)
    return _conclude(index, index.update(model=model, **options), arguments.json)


def _remove(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    index = VideoIndex.open(arguments.index)
    report = index.remove(arguments.videos)
    if arguments.json:
        print(json.dumps({"num_removed": report.num_removed, "num_videos": len(index.snapshot.videos)}))
    else:
        print(f"removed {report.num_removed} videos; {len(index.snapshot.videos)} remain")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    info = VideoIndex.open(arguments.index).info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"{info['num_videos']} videos ({info['duration_s'] / 3600:.2f} h), {info['num_rejected']} rejected")
    print(
        f"{info['num_segments']} segments of {info['segment_s']:g} s every {info['stride_s']:g} s, "
        f"{info['size_bytes'] / 2**20:.1f} MiB"
    )
    print(f"model {info['model_name']} (domain {info['model_domain']}), tokens {info['store_tokens']}")
    _print_rejected([(entry["path"], entry["reason"], entry["detail"]) for entry in info["rejected"]])
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from vlm.errors import IntegrityError
    from vlm.retrieval.index import VideoIndex

    findings = VideoIndex.open(arguments.index).verify()
    if arguments.json:
        print(json.dumps({"damaged": [dataclasses.asdict(finding) for finding in findings]}))
    for finding in findings:
        print(f"{finding.name}: {finding.problem}", file=sys.stderr)
    if findings:
        raise IntegrityError(
            f"{arguments.index}: {len(findings)} damaged; restore them from a copy or build the index again"
        )
    if not arguments.json:
        print("every file is as it was written")
    return 0


def load(source: str) -> tuple[VideoTextEncoder, str]:
    """Load a model; also return how to find it again from any folder."""
    from vlm.models import load_model
    from vlm.models.registry import find_local, load_registry

    model = load_model(source)
    is_name = os.sep not in source and (source in load_registry() or find_local(source) is not None)
    return model, source if is_name or not os.path.exists(source) else os.path.abspath(source)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.batch_size < 1 or (arguments.workers is not None and arguments.workers < 1):
        raise UsageError("--batch-size and --workers must be at least 1")
    if not arguments.timeout > 0:
        raise UsageError("--timeout must be above 0 seconds")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "batch_size": arguments.batch_size,
        "num_workers": arguments.workers or max(1, min(8, cores - 1)),
        "patience_s": arguments.timeout,
        "allow_narrow_model": arguments.allow_demo_model,
    }


def _need_videos(paths: Sequence[str], index: str) -> None:
    """Raise before a model is loaded for nothing."""
    from vlm.retrieval.ingest.scanning import scan_paths

    scan = scan_paths(paths, exclude=Path(index))
    if not scan.files:
        others = f" (but {scan.other_files.total()} other files)" if scan.other_files else ""
        raise InvalidInput(f"no video files in {', '.join(paths)}{others}; give files or folders with videos")


def _check_settings(index: VideoIndex, arguments: argparse.Namespace) -> None:
    manifest = index.manifest
    pairs = [
        ("--segment-seconds", manifest.segment_s, arguments.segment_seconds),
        ("--stride-seconds", manifest.stride_s, arguments.stride_seconds),
        ("--store-tokens", manifest.features.store_tokens, arguments.store_tokens),
    ]
    for flag, mine, asked in pairs:
        if asked is not None and asked != mine:
            raise InvalidInput(
                f"{index.folder} was built with {flag} {mine}, got {asked}; use the same, or another --out"
            )


def _conclude(index: VideoIndex, report: Report, as_json: bool) -> int:
    """Print the report; 3 if some files were rejected, 4 if none was usable."""
    rejected = [(os.fsdecode(item.path), item.reason, item.detail) for item in report.rejected]
    if as_json:
        values = dataclasses.asdict(report)
        values["rejected"] = [dict(zip(("path", "reason", "detail"), item, strict=True)) for item in rejected]
        print(json.dumps({**values, "num_videos": len(index.snapshot.videos)}))
    else:
        print(
            f"{report.num_added} added, {report.num_updated} updated, {report.num_unchanged} unchanged, "
            f"{report.num_removed} removed, {len(rejected)} rejected; {report.num_segments} segments in "
            f"{report.duration_s:.1f} s"
        )
        _print_rejected(rejected)
    if report.other_files:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(report.other_files).most_common(5))
        print(f"vlm: not video files, left alone: {kinds}", file=sys.stderr)
    if not rejected:
        return 0
    if not report.num_added + report.num_updated + report.num_unchanged:
        raise InvalidInput(f"none of {len(rejected)} files is a usable video; the first: {rejected[0][2]}")
    return RejectedItems.exit_code


def _print_rejected(rejected: Sequence[tuple[str, str, str]]) -> None:
    for _, reason, detail in rejected[:_MAX_LINES]:
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in detail)
        print(f"  rejected ({reason}): {text}")
    if len(rejected) > _MAX_LINES:
        print(f"  and {len(rejected) - _MAX_LINES} more; vlm index info --json lists them")
