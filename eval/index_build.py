"""Measure how near `vlm index build` comes to its slower part alone, and its dry run to the truth."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.errors import InvalidInput, UsageError
from vlm.retrieval.durability import write_bytes_durably

FORMAT = "vlm-index-build/1"
# what is asked of a build, and of the dry run's time as a share of the true one
LIMITS = {"share_of_limit": 0.9, "estimate": [0.7, 1.3]}
_WORLD_SEED = 31
_EXAMPLE = "vlm eval index_build --videos ~/Videos --model videomamba-m-25m --out build.json"


def main(argv: list[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="vlm eval index_build", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--videos", nargs="+", metavar="PATH", help="files and folders; without, made-up long videos")
    add("--clips", type=int, default=40, metavar="N", help="how many videos are made up (40)")
    add("--size", type=int, default=256, choices=(64, 128, 256), help="their side in pixels (256)")
    add("--work", type=Path, metavar="DIR", help="keep them here, and use those that are there")
    add("--model", default="demo", metavar="SOURCE", help="what embeds (demo)")
    add("--batch-size", type=int, default=8, metavar="N", help="segments encoded at once (8)")
    add("--workers", type=int, metavar="N", help="processes that decode (one core fewer than there are)")
    add("--rounds", type=int, default=3, metavar="N", help="of decoding, encoding and building by turns (3)")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    arguments = parser.parse_args(argv)
    if min(arguments.clips, arguments.batch_size, arguments.rounds, arguments.workers or 1) < 1:
        raise UsageError("--clips, --batch-size, --workers and --rounds must be at least 1")
    # as the command line does: threads that wait for one another must not take a core from the decoders
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory(prefix="vlm-index-build-") as scratch:
        figures = _measure(arguments, _videos(arguments, arguments.work or Path(scratch)))
    alone, both = figures["share_of_limit"], figures["share_of_all_limits"]
    took = figures["estimate"]["took_share"]
    print(f"the build: {alone:.0%} of the slower limit, {both:.0%} of what the cores allow for both")
    print(f"the dry run said {took:.2f} of what it took")
    if arguments.out:
        write_bytes_durably(arguments.out, json.dumps(figures, indent=1).encode() + b"\n")
    return 0


def _videos(arguments: argparse.Namespace, work: Path) -> list[Path]:
    from vlm.retrieval.ingest.scanning import scan_paths
    from vlm.world.chapters import sample_long, write_long

    paths = arguments.videos
    if not paths:
        videos = [sample_long(_WORLD_SEED, index) for index in range(arguments.clips)]
        write_long(videos, work / f"{arguments.clips}-{arguments.size}", size=arguments.size)
        paths = [work / f"{arguments.clips}-{arguments.size}"]
    files = scan_paths(paths, work / "none").files
    if not files:
        raise InvalidInput(f"no video files in {', '.join(map(str, paths))}")
    return list(files)


def _measure(arguments: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    import torch

    from vlm.evaluation.speed import machine
    from vlm.evaluation.tradeoff.building import measure_build
    from vlm.retrieval.embedding import choose_grid, choose_layout
    from vlm.retrieval.ingest.events import DecodeSettings
    from vlm.retrieval.words.no_model import load_encoder

    model = load_encoder(arguments.model)
    workers = arguments.workers or max(1, min(8, (os.cpu_count() or 1) - 1))
    settings = DecodeSettings(preprocessing=model.preprocessing, num_workers=workers)
    length_s, stride_s = settings.segment_s, settings.stride_s
    grid_step_s = choose_grid(model, choose_layout(model, None, stride_s), length_s, stride_s)
    settings = replace(settings, grid_step_s=grid_step_s)
    found = measure_build(
        files,
        model,
        settings,
        batch_size=arguments.batch_size,
        rounds=arguments.rounds,
        show=lambda text: print(text, flush=True),
    )
    shown = {"model": arguments.model, "batch_size": arguments.batch_size, "workers": workers}
    videos = (
        "given"
        if arguments.videos
        else f"{arguments.clips} long ones of the digit world, {arguments.size} px"
    )
    return {
        "format": FORMAT,
        "limits": LIMITS,
        "machine": machine(torch.device(str(model.device))),
        "settings": {**shown, "videos": videos},
        **found,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
