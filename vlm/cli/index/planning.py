"""Say what indexing a collection will cost before it begins."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.retrieval.ingest.estimating import Cost, Estimate
    from vlm.types import VideoTextEncoder


def show(arguments: argparse.Namespace, model: VideoTextEncoder, options: dict[str, Any]) -> int:
    """Print the estimate for `vlm index build`; nothing is written."""
    from vlm.retrieval.embedding import choose_grid, choose_layout
    from vlm.retrieval.ingest.estimating import estimate_build
    from vlm.retrieval.ingest.events import DecodeSettings
    from vlm.retrieval.ingest.scanning import scan_paths
    from vlm.retrieval.segments import check_lengths

    segment_s, stride_s = arguments.segment_seconds, arguments.stride_seconds
    check_lengths(segment_s, stride_s)
    layout = choose_layout(model, arguments.store_tokens, stride_s)
    estimate = estimate_build(
        scan_paths(arguments.paths, Path(arguments.out)).files,
        model,
        layout,
        DecodeSettings(
            preprocessing=model.preprocessing,
            segment_s=segment_s,
            stride_s=stride_s,
            segmentation=arguments.segments,
            grid_step_s=choose_grid(model, layout, segment_s, stride_s),
            patience_s=options["patience_s"],
            num_workers=options["num_workers"],
            decode_with=options["decode_with"],
        ),
        batch_size=options["batch_size"],
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(estimate)))
    else:
        _print(estimate)
    return 0


def _print(estimate: Estimate) -> None:
    print(
        f"{estimate.num_files} files, about {estimate.video_hours:.1f} h of video (opened "
        f"{estimate.num_opened}, {estimate.num_broken} of them broken)"
    )
    print(f"measured: {estimate.segments_per_s:.2f} segments a second, over {estimate.num_measured} segments")
    print(f"as asked: {_words(estimate.cost)}")
    for cost in estimate.cheaper:
        print(f"cheaper:  {_words(cost)}   {cost.flags}")


def _words(cost: Cost) -> str:
    time = f"{cost.hours:.1f} h" if cost.hours >= 1 else f"{cost.hours * 60:.1f} min"
    counts = f"{cost.num_segments} segments, {cost.num_frames} frames to encode"
    return f"{time:>9}, {cost.disk_bytes / 2**30:7.2f} GiB, {counts}"
