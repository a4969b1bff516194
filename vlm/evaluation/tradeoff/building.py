"""How near building an index comes to the slower of what decoding alone and encoding alone could do.

Where both run on the same cores, neither reaches what it does alone: the cores are a third limit.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vlm.errors import DataError
from vlm.retrieval.embedding import FeatureLayout, choose_layout, encode_segments
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.estimating import estimate_build
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings
from vlm.retrieval.ingest.pool import decode_files
from vlm.types import VideoTextEncoder

_ENCODE_S = 5.0

RATES = ("decode", "encode", "processor", "build")


def measure_build(
    files: Sequence[Path],
    model: VideoTextEncoder,
    settings: DecodeSettings,
    *,
    batch_size: int,
    rounds: int,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Estimate a build, then decode, encode and build by turns, so that all see the machine in one state.

    Args:
        files: The videos.
        model: What embeds them.
        settings: How they are decoded; the same for all.
        batch_size: Segments encoded at once.
        rounds: Of the three.
        show: Told each figure as it is found.

    Returns:
        JSON-ready: segments a second of each round, medians, ``share_of_limit`` (of the build, in the slower
        of the two alone), ``share_of_all_limits`` (also of ``processor``, what all cores could do if they did
        nothing but the work that both take alone), and ``estimate``: seconds the dry run said, and as a share
        of what the build took.

    Raises:
        DataError: None of the files can be decoded.
    """
    layout = choose_layout(model, None, settings.stride_s)
    begun = time.monotonic()
    said = estimate_build(files, model, layout, settings, batch_size=batch_size)
    estimated_s = said.cost.hours * 3600
    show(f"dry run: {estimated_s:.1f} s for {said.cost.num_segments} segments")
    estimate = {"took_s": time.monotonic() - begun, "said_s": estimated_s, "segments": said.cost.num_segments}
    figures: dict[str, list[float]] = {name: [] for name in RATES}
    seconds = []
    for number in range(1, rounds + 1):
        alone = _alone(files, model, settings, layout, batch_size)
        built, took_s = _build(files, model, settings, batch_size)
        seconds.append(took_s)
        for name, rate in zip(RATES, (*alone, built), strict=True):
            figures[name].append(rate)
        rates = ", ".join(f"{name} {rates[-1]:.2f}" for name, rates in figures.items())
        show(f"round {number}, segments a second: {rates}")
    middle = {name: median(rates) for name, rates in figures.items()}
    every = zip(*(figures[name] for name in RATES[:-1]), strict=True)
    slower = [min(pair) for pair in zip(figures["decode"], figures["encode"], strict=True)]
    shares = [rate / limit for rate, limit in zip(figures["build"], slower, strict=True)]
    of_all = [rate / min(limits) for rate, limits in zip(figures["build"], every, strict=True)]
    estimate |= {"took_share": median(estimated_s / took_s for took_s in seconds)}
    return {
        "files": len(files),
        "segments_per_s": figures,
        "median": middle,
        "share_of_limit": median(shares),
        "share_of_all_limits": median(of_all),
        "shares": shares,
        "estimate": estimate,
    }


def _alone(
    files: Sequence[Path],
    model: VideoTextEncoder,
    settings: DecodeSettings,
    layout: FeatureLayout,
    batch_size: int,
) -> tuple[float, float, float]:
    """Return segments a second decoded, encoded, and both if they had all cores and nothing else to do."""
    used_s = _processor_s()
    decoded, frames_per_segment, count, batch = _decode(files, settings, batch_size)
    decoding_s = (_processor_s() - used_s) / count
    # of a grid, a segment brings fewer frames than it has
    share = frames_per_segment / settings.preprocessing.num_frames
    encoded, encoding_s = _encode(model, batch, layout)
    both = (os.cpu_count() or 1) / max(decoding_s + encoding_s * share, 1e-9)
    return decoded, encoded / share, both


def _decode(
    files: Sequence[Path], settings: DecodeSettings, batch_size: int
) -> tuple[float, float, int, list[np.ndarray]]:
    """Return segments decoded a second once the decoders run, frames a segment, segments, some clips."""
    wanted = settings.preprocessing.num_frames
    started, count, num_frames = None, 0, 0
    frames: list[np.ndarray] = []
    with closing(decode_files(files, settings)) as events:
        for event in events:
            started = started or time.monotonic()
            if isinstance(event, DecodedSegment):
                count += 1
                num_frames += len(event.video)
                frames.extend(event.video[: batch_size * wanted - len(frames)])
    if not frames or started is None:
        raise DataError("none of the files can be decoded; vlm index build says why", "undecodable")
    rate = count / (time.monotonic() - started)
    # a last clip that is not whole repeats the first frame
    frames += frames[:1] * (-len(frames) % wanted)
    batch = [np.stack(frames[first : first + wanted]) for first in range(0, len(frames), wanted)]
    return rate, num_frames / count, count, batch


def _encode(model: VideoTextEncoder, batch: list[np.ndarray], layout: FeatureLayout) -> tuple[float, float]:
    """Return segments encoded a second, and the processor time of one."""
    encode_segments(model, batch, layout)
    begun, used_s, count = time.monotonic(), _processor_s(), 0
    while time.monotonic() - begun < _ENCODE_S:
        encode_segments(model, batch, layout)
        count += len(batch)
    return count / (time.monotonic() - begun), (_processor_s() - used_s) / count


def _processor_s() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _build(
    files: Sequence[Path], model: VideoTextEncoder, settings: DecodeSettings, batch_size: int
) -> tuple[float, float]:
    """Return segments indexed a second and the seconds in all, starting and committing included."""
    with tempfile.TemporaryDirectory(prefix="vlm-index-build-") as scratch:
        index = VideoIndex.create(
            Path(scratch) / "index",
            model,
            segment_s=settings.segment_s,
            stride_s=settings.stride_s,
            segmentation=settings.segmentation,
        )
        report = index.add(
            files,
            model=model,
            batch_size=batch_size,
            num_workers=settings.num_workers,
            allow_narrow_model=True,
        )
    return report.num_segments / report.duration_s, report.duration_s
