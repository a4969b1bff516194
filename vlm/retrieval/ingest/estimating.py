"""What indexing a collection will cost, from some seconds of doing it to a sample."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlm.data.frame_sampling import grid_step, grid_times
from vlm.errors import DataError
from vlm.retrieval.embedding import FeatureLayout, encode_segments
from vlm.retrieval.ingest.encoding import Batches, make_batches
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Failed, Opened
from vlm.retrieval.ingest.pool import decode_files
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
        num_frames: Frames it encodes; those that segments share count once where they are encoded once.
        hours: How long it takes on this machine as it is now.
        disk_bytes: How large the index becomes.
    """

    flags: str
    num_segments: int
    num_frames: int
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
        frames_per_s: The same in encoded frames, by which other ways of cutting are judged.
        num_measured: Segments that were measured.
        cost: As asked for.
        cheaper: Other ways, the nearest first.
    """

    num_files: int
    num_opened: int
    num_broken: int
    video_hours: float
    segments_per_s: float
    frames_per_s: float
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
    order = random.Random(0).sample(files, len(files))
    durations, num_broken = _durations(order, settings, budget_s * _OPENING_SHARE)
    rates = _measure(order, model, layout, settings, batch_size, budget_s * (1 - _OPENING_SHARE))
    scale = _scale(files, list(durations), num_broken)

    def cost(flags: str, layout: FeatureLayout, segment_s: float, stride_s: float) -> Cost:
        known = _count(list(durations.values()), settings, segment_s, stride_s)
        count, frames = (round(scale * number) for number in known)
        row_bytes = 2 * layout.dim + layout.token_bytes + _ROW_BYTES
        return Cost(
            flags=flags,
            num_segments=count,
            num_frames=frames,
            hours=frames / rates.frames_per_s / 3600,
            disk_bytes=count * row_bytes,
        )

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
        segments_per_s=rates.segments_per_s,
        frames_per_s=rates.frames_per_s,
        num_measured=rates.num_segments,
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


def _count(
    durations: Sequence[float], settings: DecodeSettings, segment_s: float, stride_s: float
) -> tuple[int, int]:
    """Return how many segments videos of these lengths have, and how many frames are encoded for them."""
    wanted = settings.preprocessing.num_frames
    num_segments = num_frames = 0
    for seconds in durations:
        segments = cut_segments(seconds, segment_s, stride_s)
        num_segments += len(segments)
        if settings.grid_step_s is None:
            num_frames += wanted * len(segments)
        else:
            times_s = grid_times(segments, wanted, grid_step(segment_s, stride_s, wanted))
            num_frames += len(np.unique(times_s))
    return num_segments, num_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """What was embedded in a second, and how many segments in all."""

    segments_per_s: float
    frames_per_s: float
    num_segments: int


def _measure(
    files: Sequence[Path],
    model: VideoTextEncoder,
    layout: FeatureLayout,
    settings: DecodeSettings,
    batch_size: int,
    budget_s: float,
) -> _Rates:
    """Embed for some seconds."""
    side = model.preprocessing.image_size
    blank = np.zeros((model.preprocessing.num_frames, 3, side, side), np.float32)
    encode_segments(model, [blank] * batch_size, layout)  # the first batch takes longer
    if settings.num_workers == 1:
        # what a lone decoder does ahead takes time from an encoder on the same cores; a build gets it back
        settings = replace(settings, ahead_bytes=batch_size * blank.nbytes)
    begun, times, counts = time.monotonic(), [], []
    waiting: Batches[None] = make_batches(model, layout, settings.grid_step_s, batch_size)
    with closing(decode_files(files, settings)) as events:
        # None comes last, for what is left of a batch
        for event in itertools.chain(events, [None]):
            if isinstance(event, DecodedSegment):
                waiting.add(None, event)
            if not waiting.is_full and event is not None:
                continue
            if (encoded := waiting.encode()) is not None:
                times.append(time.monotonic())
                counts.append((len(encoded.keys), encoded.num_frames))
                if times[-1] - times[0] > budget_s:
                    break
    if not times:
        raise DataError("none of the files can be decoded; vlm index build says why", "undecodable")
    if len(times) == 1:  # start included: there is nothing else to go by
        (segments, frames), took_s = counts[0], times[0] - begun
    else:
        segments, frames = (sum(column) for column in zip(*counts[1:], strict=True))
        took_s = times[-1] - times[0]
    return _Rates(
        segments_per_s=segments / max(took_s, 1e-6),
        frames_per_s=max(frames, 1) / max(took_s, 1e-6),
        num_segments=sum(count for count, _ in counts),
    )


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
