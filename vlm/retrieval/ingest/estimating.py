"""What indexing a collection will cost, from some seconds of doing it to a sample."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlm.errors import DataError
from vlm.retrieval.embedding import FeatureLayout, encode_segments
from vlm.retrieval.ingest.pool import DecodedSegment, DecodeSettings, Failed, Opened, decode_files
from vlm.retrieval.segments import cut_segments
from vlm.types import VideoTextEncoder

# of the time, for opening files; the rest goes into decoding and encoding
_OPENING_SHARE = 0.25
# of a segment: its place in the catalogue, the hashes of its frames, what the files round up to
_ROW_BYTES = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a way of indexing costs.

    Attributes:
        flags: The flags of `vlm index build` that ask for it; empty for the way that was asked about.
        num_segments: Segments it makes.
        hours: How long it takes on this machine as it is now.
        disk_bytes: How large the index becomes.
    """

    flags: str
    num_segments: int
    hours: float
    disk_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The cost of indexing a collection.

    Attributes:
        num_files: Video files found.
        num_opened: Of how many the length is known; the others are judged by their sizes.
        num_broken: How many of those could not be opened.
        video_hours: Footage in all.
        segments_per_s: Measured, decoding and encoding together.
        num_measured: Segments that were measured.
        cost: As asked for.
        cheaper: Other ways, the nearest first.
    """

    num_files: int
    num_opened: int
    num_broken: int
    video_hours: float
    segments_per_s: float
    num_measured: int
    cost: Cost
    cheaper: tuple[Cost, ...]


def estimate_build(
    files: Sequence[Path],
    model: VideoTextEncoder,
    layout: FeatureLayout,
    settings: DecodeSettings,
    *,
    batch_size: int,
    budget_s: float = 30.0,
) -> Estimate:
    """Open and embed a random sample of files for some seconds, and scale up. Nothing is written.

    Args:
        files: All files that would be indexed.
        model: What would embed them.
        layout: What would be stored of a segment.
        settings: How they would be decoded.
        batch_size: Segments encoded at once.
        budget_s: Longest time, apart from starting up; a collection that needs less is done in full.

    Raises:
        DataError: None of the sample can be decoded.
    """
    order = list(files)
    random.Random(0).shuffle(order)
    durations, num_broken = _durations(order, settings, budget_s * _OPENING_SHARE)
    rate, num_measured = _rate(order, model, layout, settings, batch_size, budget_s * (1 - _OPENING_SHARE))
    scale = _scale(files, list(durations), num_broken)

    def cost(flags: str, layout: FeatureLayout, segment_s: float, stride_s: float) -> Cost:
        known = sum(len(cut_segments(seconds, segment_s, stride_s)) for seconds in durations.values())
        count = round(scale * known)
        row_bytes = 2 * layout.dim + layout.token_bytes + _ROW_BYTES
        return Cost(flags=flags, num_segments=count, hours=count / rate / 3600, disk_bytes=count * row_bytes)

    asked = cost("", layout, settings.segment_s, settings.stride_s)
    others = []
    if layout.store_tokens != "none":
        slim = replace(layout, store_tokens="none")
        others.append(cost("--store-tokens none", slim, settings.segment_s, settings.stride_s))
    for factor in (1, 2, 4):
        length = settings.segment_s * factor
        if length > settings.stride_s:
            flags = f"--segment-seconds {length:g} --stride-seconds {length:g}"
            others.append(cost(flags, layout, length, length))
    return Estimate(
        num_files=len(files),
        num_opened=len(durations) + num_broken,
        num_broken=num_broken,
        video_hours=scale * sum(durations.values()) / 3600,
        segments_per_s=rate,
        num_measured=num_measured,
        cost=asked,
        cheaper=tuple(others),
    )


def _durations(
    files: Sequence[Path], settings: DecodeSettings, budget_s: float
) -> tuple[dict[Path, float], int]:
    """Return the lengths of files, as many as can be opened in the time, and how many were broken."""
    found: dict[Path, float] = {}
    num_broken, started = 0, None
    with closing(decode_files(files, replace(settings, only_open=True))) as events:
        for event in events:
            started = started or time.monotonic()  # a decoder takes seconds to start
            if isinstance(event, Opened):
                found[files[event.file]] = max(event.duration_s, 1e-3)
            elif isinstance(event, Failed):
                num_broken += 1
            if found and time.monotonic() - started > budget_s:
                break
    if not found:
        raise DataError("none of the files can be opened; vlm index build says why", "unreadable")
    return found, num_broken


def _rate(
    files: Sequence[Path],
    model: VideoTextEncoder,
    layout: FeatureLayout,
    settings: DecodeSettings,
    batch_size: int,
    budget_s: float,
) -> tuple[float, int]:
    """Return how many segments a second are embedded, and how many were."""
    side = model.preprocessing.image_size
    blank = np.zeros((model.preprocessing.num_frames, 3, side, side), np.float32)
    encode_segments(model, [blank] * batch_size, layout)  # the first batch takes longer
    begun, times, counts = time.monotonic(), [], []
    with closing(decode_files(files, settings)) as events:
        for batch in _batches(events, batch_size):
            encode_segments(model, batch, layout)
            times.append(time.monotonic())
            counts.append(len(batch))
            if times[-1] - times[0] > budget_s:
                break
    if not times:
        raise DataError("none of the files can be decoded; vlm index build says why", "undecodable")
    if len(times) == 1:  # start included: there is nothing else to go by
        return counts[0] / max(times[0] - begun, 1e-6), counts[0]
    return sum(counts[1:]) / max(times[-1] - times[0], 1e-6), sum(counts)


def _batches(events: Iterator[object], batch_size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for event in events:
        if isinstance(event, DecodedSegment):
            batch.append(event.video)
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def _scale(files: Sequence[Path], opened: Sequence[Path], num_broken: int) -> float:
    """Return what the sums over the opened files are multiplied by for the sums over all."""
    if len(opened) + num_broken >= len(files):
        return 1.0
    whole, part = (sum(_size(path) for path in paths) for paths in (files, opened))
    share = len(opened) / (len(opened) + num_broken)
    return share * whole / max(part, 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
