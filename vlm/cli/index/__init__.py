"""Make and keep a searchable index of videos."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.cli.index import engines, planning, quality, upkeep, watching
from vlm.cli.index.upkeep import add_action, print_rejected
from vlm.errors import InvalidInput, RejectedItems, UsageError
from vlm.progress import printable

if TYPE_CHECKING:
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.reports import Report
    from vlm.types import VideoTextEncoder

EXAMPLE = "vlm index build ~/Videos --out my-index --model videomamba-m-25m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = add_action(actions, "build", "index videos; run it again to go on or to add", EXAMPLE)
    build.add_argument("paths", nargs="+", metavar="PATH", help="video files and folders")
    build.add_argument("--out", required=True, metavar="INDEX", help="the index folder")
    build.add_argument(
        "--model", required=True, metavar="SOURCE", help="a name of 'vlm models list', a path, or none"
    )
    build.add_argument(
        "--segments",
        choices=("even", "shots"),
        default="even",
        help="cut by length alone, or first where one shot ends and another begins (even)",
    )
    build.add_argument("--segment-seconds", type=float, default=8.0, help="length of a segment (8)")
    build.add_argument("--stride-seconds", type=float, default=4.0, help="from one start to the next (4)")
    build.add_argument(
        "--store-tokens",
        choices=("none", "pooled", "full"),
        help="features kept for reranking (pooled if the model can rerank)",
    )
    build.add_argument(
        "--dry-run", action="store_true", help="try a sample for half a minute, say what it all will cost"
    )
    engines.configure_build(build)
    _add_embedding_flags(build)
    _add_choice_flags(build)
    add = add_action(actions, "add", "index more videos", "vlm index add my-index new-clips")
    add.add_argument("index", metavar="INDEX")
    add.add_argument("paths", nargs="+", metavar="PATH", help="video files and folders")
    update = add_action(
        actions, "update", "bring in what is new or changed, drop what is gone", "vlm index update I"
    )
    update.add_argument("index", metavar="INDEX")
    for action in (add, update):
        action.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
        _add_embedding_flags(action)
        _add_choice_flags(action)
    _add_embedding_flags(watching.configure(actions))
    remove = add_action(
        actions, "remove", "take videos out; their files stay", "vlm index remove my-index holiday.mp4"
    )
    remove.add_argument("index", metavar="INDEX")
    remove.add_argument("videos", nargs="+", metavar="VIDEO", help="identifiers or paths")
    remove.add_argument("--json", action="store_true", help="print a JSON object")
    info = add_action(actions, "info", "say what an index holds", "vlm index info my-index --json")
    info.add_argument("index", metavar="INDEX")
    info.add_argument("--videos", action="store_true", help="list them, too, with their identifiers")
    info.add_argument("--json", action="store_true", help="print a JSON object")
    check = add_action(
        actions,
        "check",
        "does it find what you know is there?",
        "vlm index check my-index --queries known.csv",
    )
    quality.configure(check)
    upkeep.configure(actions)
    engines.configure_task(actions)


def run(arguments: argparse.Namespace) -> int:
    """Do one action and return its exit code."""
    # read when torch is loaded: threads of the encoder that wait must not take a core from the decoders
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return {
        "build": _build,
        "add": _add,
        "update": _update,
        "watch": lambda arguments: watching.run_watch(arguments, _options(arguments)),
        "remove": _remove,
        "info": _info,
        "check": quality.run_check,
        "task": engines.run_task,
        **upkeep.ACTIONS,
    }[arguments.action](arguments)


def _add_embedding_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="segments encoded at once (8)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode")
    parser.add_argument(
        "--decode-with",
        default="cpu",
        metavar="DEVICE",
        help="cpu, or a device of 'vlm doctor', as cuda, cuda:1, vaapi, which decodes what it can (cpu)",
    )
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


def _add_choice_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--first",
        metavar="recent|PATH",
        help="embed what changed last first, or one folder; it can be searched while the rest follows",
    )
    parser.add_argument(
        "--rehash", action="store_true", help="compare contents even where size and time are as they were"
    )


def _build(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    options = _options(arguments)
    engines.check_flags(arguments)
    _need_videos(arguments.paths, arguments.out)
    model, source = load(arguments.model)
    if arguments.dry_run:
        return planning.show(arguments, model, options)
    is_new = not (Path(arguments.out) / "manifest.json").exists()
    if is_new:
        index = VideoIndex.create(
            arguments.out,
            model,
            source=source,
            segment_s=arguments.segment_seconds,
            stride_s=arguments.stride_seconds,
            store_tokens=arguments.store_tokens,
            segmentation=arguments.segments,
        )
    else:
        index = VideoIndex.open(arguments.out)
        _check_settings(index, arguments)
    try:
        if arguments.engine == "local":
            report = index.add(arguments.paths, model=model, **options)
        else:
            report = engines.build_elsewhere(arguments, index, model, options)
    except InvalidInput:
        if is_new:
            index.discard_if_empty()
        raise
    return _conclude(index, model, report, arguments.json)


def _add(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    options = _options(arguments)
    _need_videos(arguments.paths, arguments.index)
    index = VideoIndex.open(arguments.index)
    model, _ = load(arguments.model or index.manifest.model.source)
    report = index.add(arguments.paths, model=model, **options)
    return _conclude(index, model, report, arguments.json)


def _update(arguments: argparse.Namespace) -> int:
    from vlm.retrieval.index import VideoIndex

    options = _options(arguments)
    index = VideoIndex.open(arguments.index)
    model, _ = load(arguments.model or index.manifest.model.source)
    return _conclude(index, model, index.update(model=model, **options), arguments.json)


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

    index = VideoIndex.open(arguments.index)
    info = index.info()
    if arguments.videos:
        info["videos"] = [
            {
                "video_id": one.video_id,
                "path": os.fsdecode(one.path),
                "duration_s": one.duration_s,
                "num_segments": one.num_segments,
            }
            for one in index.snapshot.videos
        ]
    if arguments.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"{info['num_videos']} videos ({info['duration_s'] / 3600:.2f} h), {info['num_rejected']} rejected")
    print(
        f"{info['num_segments']} segments of {info['segment_s']:g} s every {info['stride_s']:g} s "
        f"({info['segmentation']}), {info['size_bytes'] / 2**20:.1f} MiB"
    )
    if info["grid_step_s"]:
        print(f"frames every {info['grid_step_s']:g} s of a video, shared by its segments")
    print(f"model {info['model_name']} (domain {info['model_domain']}), tokens {info['store_tokens']}")
    print(_describe_structure(info["structure"], info["num_segments"] + info["num_dead_segments"]))
    print_rejected([(entry["path"], entry["reason"], entry["detail"]) for entry in info["rejected"]])
    for video in info.get("videos", ()):
        print(f"{video['video_id']}  {video['duration_s']:9.1f} s  {printable(video['path'])}")
    return 0


def _describe_structure(structure: dict[str, Any] | None, num_rows: int) -> str:
    """Say how the index is searched and what that finds."""
    if structure is None:
        return "search structure: none yet; the first search makes it"
    title = f"search structure {structure['kind']}, {structure['bytes_per_vector']:.0f} bytes a segment"
    missing = num_rows - structure["num_rows"]
    rest = f"; {missing} segments are not in it yet" if missing > 0 else ""
    if structure["kind"] == "flat":
        return f"{title}: exact{rest}"
    found = ", ".join(
        f"{share:.3f} of {structure['num_queries'][name]} {name}"
        for name, share in structure["recall_at_10"].items()
    )
    made = (
        "" if structure["made_on"] == "cpu" else f", made on the {structure['made_on'].replace('gpu', 'GPU')}"
    )
    return f"{title}: recall@10 {found}, measured against exact search{made}{rest}"


def load(source: str) -> tuple[VideoTextEncoder, str]:
    """Load a model; also return how to find it again from any folder."""
    from vlm.models.registry import find_local, load_registry
    from vlm.retrieval.words.no_model import NAME, load_encoder

    model = load_encoder(source)
    if source == NAME:
        return model, source
    is_name = os.sep not in source and (source in load_registry() or find_local(source) is not None)
    return model, source if is_name or not os.path.exists(source) else os.path.abspath(source)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.batch_size < 1 or (arguments.workers is not None and arguments.workers < 1):
        raise UsageError("--batch-size and --workers must be at least 1")
    if not 0 < arguments.timeout < math.inf:
        raise UsageError(f"--timeout must be above 0 seconds and finite, got {arguments.timeout:g}")
    if arguments.decode_with != "cpu" and getattr(arguments, "engine", "local") == "local":
        from vlm.retrieval.ingest.pool import check_device

        check_device(arguments.decode_with)  # before a model is loaded for nothing
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "batch_size": arguments.batch_size,
        "num_workers": arguments.workers or max(1, min(8, cores - 1)),
        "patience_s": arguments.timeout,
        "decode_with": arguments.decode_with,
        "allow_narrow_model": arguments.allow_demo_model,
        "rehash": arguments.rehash,
        "first": arguments.first,
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
        ("--segments", manifest.segmentation, arguments.segments),
        ("--segment-seconds", manifest.segment_s, arguments.segment_seconds),
        ("--stride-seconds", manifest.stride_s, arguments.stride_seconds),
        ("--store-tokens", manifest.features.store_tokens, arguments.store_tokens),
    ]
    for flag, mine, asked in pairs:
        if asked is not None and asked != mine:
            raise InvalidInput(
                f"{index.folder} was built with {flag} {mine}, got {asked}; use the same, or another --out"
            )


def print_report(index: VideoIndex, report: Report, as_json: bool) -> list[tuple[str, str, str]]:
    """Print what a change of an index did; return path, reason and detail of the rejected files."""
    rejected = [(os.fsdecode(item.path), item.reason, item.detail) for item in report.rejected]
    if as_json:
        values = dataclasses.asdict(report)
        values["rejected"] = [dict(zip(("path", "reason", "detail"), item, strict=True)) for item in rejected]
        print(json.dumps({**values, "num_videos": len(index.snapshot.videos)}))
    else:
        print(
            f"{report.num_added} added, {report.num_updated} updated, {report.num_renamed} renamed, "
            f"{report.num_unchanged} unchanged, {report.num_removed} removed, {len(rejected)} rejected; "
            f"{report.num_segments} segments in {report.duration_s:.1f} s"
        )
        if report.num_on_device or report.fallbacks:
            print(_describe_decoding(report))
        print_rejected(rejected)
    return rejected


def _describe_decoding(report: Report) -> str:
    """Say how many videos a device decoded, and why it did not decode the others."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.fallbacks.items()))
    rest = f"; {sum(report.fallbacks.values())} fell back to the CPU: {reasons}" if reasons else ""
    return f"decoded on the device: {report.num_on_device} videos{rest}"


def _conclude(index: VideoIndex, model: VideoTextEncoder, report: Report, as_json: bool) -> int:
    """Print the report; 3 if some files were rejected, 4 if none was usable."""
    from vlm.retrieval.backends.plan import FLAT_ROWS

    if len(index.snapshot.row_video) > FLAT_ROWS:
        from vlm.retrieval.searcher import Searcher

        Searcher(index, model)  # trains what the first search would have to wait for
    rejected = print_report(index, report, as_json)
    if report.other_files:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(report.other_files).most_common(5))
        print(f"vlm: not video files, left alone: {kinds}", file=sys.stderr)
    if not rejected:
        return 0
    if not report.num_added + report.num_updated + report.num_renamed + report.num_unchanged:
        raise InvalidInput(f"none of {len(rejected)} files is a usable video; the first: {rejected[0][2]}")
    return RejectedItems.exit_code
