"""Where two videos show the same: frames with like hashes at one constant distance in time.

How many copies are recognised, and how many other videos are taken for some, ``vlm eval copies`` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm.data.frame_sampling import grid_times
from vlm.retrieval.duplicates.hashing import NO_HASH

MAX_DISTANCE = 14
_MIN_MATCHES = 3
_MIN_SHARE = 0.5
_OFFSETS_TRIED = 8
# bits by which frames that fit better backwards show footage turned round; noise is below
_TURNED_BITS = 2.0
# a few frames in a row may differ: a blend, a caption, a cut that one of the two places later
_MAX_GAP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """The hashed frames of a video: times (n,) float64 in seconds, ascending, and hashes (n,) uint64."""

    times_s: np.ndarray
    hashes: np.ndarray

    @classmethod
    def of_segments(cls, bounds: np.ndarray, hashes: np.ndarray, grid_step_s: float | None = None) -> Frames:
        """Put the frames of segments in order, each moment once.

        Args:
            bounds: (segments, 2) seconds.
            hashes: (segments, frames) uint64, of the middles of equal spans of each.
            grid_step_s: The step of the grid that they are taken from, if there is one.
        """
        if grid_step_s is None:
            spans = (np.arange(hashes.shape[1]) + 0.5) / max(hashes.shape[1], 1)
            times = bounds[:, :1] + spans * (bounds[:, 1:] - bounds[:, :1])
        else:
            times = grid_times(bounds, hashes.shape[1], grid_step_s)
        # overlapping segments show the same frames
        unique, first = np.unique(np.round(times.ravel(), 2), return_index=True)
        return cls(times_s=unique, hashes=hashes.ravel()[first])

    def turned(self) -> Frames:
        """Return the same footage played backwards."""
        return Frames(times_s=-self.times_s[::-1], hashes=self.hashes[::-1])


@dataclass(frozen=True, slots=True)
class Overlap:
    """A stretch of one video and the stretch of another that shows the same, in seconds."""

    start_s: float
    end_s: float
    other_start_s: float
    other_end_s: float


@dataclass(frozen=True, slots=True)
class _Run:
    """Frames alike at one distance in time: the first and the last, how many, and their mean bits apart."""

    offset_s: float
    first: int
    last: int
    count: int
    bits: float


def liken(hashes: np.ndarray, look: int) -> np.ndarray:
    """Return (segments,) how like a hash their frames (segments, frames) are, 1 at most; 0 if unlike."""
    if not hashes.size:
        return np.zeros(len(hashes))
    nearest = distances(hashes, np.full(1, look, np.uint64)).min(axis=1)
    likeness: np.ndarray = np.where(nearest <= MAX_DISTANCE, 1 - nearest / 64, 0.0)
    return likeness


def find_overlap(video: Frames, other: Frames, start_s: float, end_s: float) -> Overlap | None:
    """Return the stretch around a moment of a video that another video shows, too; None if it does not.

    The same pictures in the opposite order are no copy: what comes in is not what goes out.

    Args:
        video: Holds the moment.
        other: Where the same footage is looked for.
        start_s: Where the moment begins.
        end_s: Where it ends.
    """
    anchor = np.flatnonzero((video.times_s >= start_s) & (video.times_s <= end_s) & (video.hashes != NO_HASH))
    if len(anchor) < _MIN_MATCHES or len(other.times_s) < _MIN_MATCHES:
        return None
    step_s = float(np.median(np.diff(video.times_s[anchor])))
    best = _best_run(video, other, anchor, step_s)
    if best is None:
        return None
    turned = _best_run(video, other.turned(), anchor, step_s)
    if turned is not None and turned.bits + _TURNED_BITS < best.bits:
        return None
    start_s = max(0.0, float(video.times_s[best.first]) - step_s / 2)
    end_s = float(video.times_s[best.last]) + step_s / 2
    other_start_s = max(0.0, start_s + best.offset_s)
    return Overlap(start_s, end_s, other_start_s, max(other_start_s, end_s + best.offset_s))


def distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return in how many bits hashes differ; 64 where one of them is none."""
    bits = np.bitwise_count(hashes ^ others)
    return np.where((hashes == NO_HASH) | (others == NO_HASH), np.uint8(64), bits)


def _likely_offsets(video: Frames, other: Frames, anchor: np.ndarray, step_s: float) -> list[float]:
    """Return the distances in time at which most frames of the moment have their like, most first."""
    is_like = distances(video.hashes[anchor][:, None], other.hashes[None]) <= MAX_DISTANCE
    mine, theirs = np.nonzero(is_like)
    offsets = np.round((other.times_s[theirs] - video.times_s[anchor][mine]) / (step_s / 2))
    values, counts = np.unique(offsets, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_OFFSETS_TRIED]
    return [float(value) * step_s / 2 for value in values[order]]


def _best_run(video: Frames, other: Frames, anchor: np.ndarray, step_s: float) -> _Run | None:
    """Return the run of most frames through the moment, of those at likely distances in time."""
    offsets = _likely_offsets(video, other, anchor, step_s)
    runs = [run for offset_s in offsets if (run := _grow(video, other, anchor, offset_s, step_s)) is not None]
    return max(runs, key=lambda run: run.count, default=None)


def _grow(video: Frames, other: Frames, anchor: np.ndarray, offset_s: float, step_s: float) -> _Run | None:
    """Return the run through the moment at one distance in time; None if too little is alike."""
    bits = _bits(video, other, offset_s, 0.75 * step_s)
    is_like = bits <= MAX_DISTANCE
    if np.count_nonzero(is_like[anchor]) < max(_MIN_MATCHES, _MIN_SHARE * len(anchor)):
        return None
    first = last = int(anchor[is_like[anchor]][0])
    for position in range(first + 1, len(is_like)):
        if is_like[position]:
            last = position
        elif position - last > _MAX_GAP:
            break
    for position in range(first - 1, -1, -1):
        if is_like[position]:
            first = position
        elif first - position > _MAX_GAP:
            break
    found = bits[first : last + 1][is_like[first : last + 1]]
    return _Run(offset_s, first, last, len(found), float(found.mean()))


def _bits(video: Frames, other: Frames, offset_s: float, reach_s: float) -> np.ndarray:
    """Return (frames,) by how many bits the other video's frame at that distance in time differs."""
    wanted = video.times_s + offset_s
    right = np.searchsorted(other.times_s, wanted)
    fewest = np.full(len(wanted), 64, np.uint8)
    for shift in (-1, 0, 1):
        place = np.clip(right + shift, 0, len(other.times_s) - 1)
        is_near = np.abs(other.times_s[place] - wanted) <= reach_s
        found = np.where(is_near, distances(video.hashes, other.hashes[place]), np.uint8(64))
        fewest = np.minimum(fewest, found)
    return fewest
