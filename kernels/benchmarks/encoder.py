"""Time the video encoder with the C++ kernels beside chunks in PyTorch: python kernels/benchmarks/encoder.py.

The same model with random weights, forward, fp32, by turns in one process, so that both meet the same
disturbances; ratios are the median over the turns, of processor time and of wall time. With more than one
thread, processor time counts those that wait too. Nothing is printed unless the features agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import forced, relative_error
from run import commit, machine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vlm.models import VideoMamba, VideoMambaConfig

BACKENDS = ("cpu", "chunked")
TOLERANCE = 1e-4
# whose own time belongs to what; the rest is "other"
PARTS = {
    "scan": ("vlm::bi_scan",),
    "convolution": ("vlm::conv2",),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution"),
}


def main(argv: list[str] | None = None) -> int:
    """Compare, then time with each number of threads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=192, help="channels of a token (192: VideoMamba-Ti)")
    parser.add_argument("--depth", type=int, default=24, help="blocks")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="pixels of a frame's side")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="threads of torch, one by one")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    size = {name: getattr(arguments, name) for name in ("width", "depth", "frames", "side")}
    config = VideoMambaConfig(
        width=arguments.width,
        depth=arguments.depth,
        num_frames=arguments.frames,
        image_size=arguments.side,
    )
    model = VideoMamba(config).eval()
    video = torch.randn(1, arguments.frames, config.channels, arguments.side, arguments.side)
    results: dict[str, Any] = {"commit": commit(), "machine": machine(), "model": size, "threads": {}}
    with torch.inference_mode():
        ours, other = (encode(model, video, backend) for backend in BACKENDS)
        error = relative_error([ours], [other.double()])
        if not error < TOLERANCE:
            print(f"the features differ by {error:.1e}; no ratio is worth printing", file=sys.stderr)
            return 1
        results["features_relative_difference"] = error
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            row, own = by_turns(model, video, arguments.turns), shares(model, video)
            results["threads"][str(threads)] = {**row, "shares": own}
            parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in own.items())
            print(
                f"{threads} threads: C++ {row['cpu_ms']:.0f} ms of processor time, chunked "
                f"{row['chunked_ms']:.0f} ms, {row['ratio']:.1f} x (wall {row['wall_ratio']:.1f} x); {parts}",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def encode(model: VideoMamba, video: Tensor, backend: str) -> Tensor:
    """Return the tokens (1, 1 + places, width) that the model computes with ``backend``."""
    with forced(backend):
        tokens: Tensor = model(video).tokens
    return tokens


def by_turns(model: VideoMamba, video: Tensor, turns: int) -> dict[str, float]:
    """Return medians of the processor time in ms, and of the ratios of processor and of wall time."""
    spent: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    passed: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for turn in range(turns + 1):
        for backend in BACKENDS if turn % 2 else BACKENDS[::-1]:
            begin, start = time.perf_counter(), time.process_time()
            encode(model, video, backend)
            if turn:  # the first turn warms up
                spent[backend].append(1e3 * (time.process_time() - start))
                passed[backend].append(1e3 * (time.perf_counter() - begin))
    ours, other = BACKENDS
    ratios = [b / a for a, b in zip(spent[ours], spent[other], strict=True)]
    wall = [b / a for a, b in zip(passed[ours], passed[other], strict=True)]
    return {
        "cpu_ms": statistics.median(spent[ours]),
        "chunked_ms": statistics.median(spent[other]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "wall_ratio": statistics.median(wall),
        "turns": turns,
    }


def shares(model: VideoMamba, video: Tensor) -> dict[str, float]:
    """Return which share of the operators' time belongs to what with the C++ kernels, over three runs."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(3):
            encode(model, video, BACKENDS[0])
    own = {event.key: event.self_cpu_time_total for event in record.key_averages()}
    total = sum(own.values())
    row = {part: sum(own.get(name, 0.0) for name in names) / total for part, names in PARTS.items()}
    return row | {"other": 1.0 - sum(row.values())}


if __name__ == "__main__":
    sys.exit(main())
