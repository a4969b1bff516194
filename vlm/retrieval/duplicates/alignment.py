"""Where two videos show the same: frames with like hashes at one constant distance in time.

On 58 real clips and copies of them (256 x 144, rate factor 33, 15 frames a second, cut 1.3 s late) the copy
is recognised for 93 %, and of 3,306 pairs of different clips 2 are taken for copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm.retrieval.duplicates.hashing import NO_HASH

MAX_DISTANCE = 14
_MIN_MATCHES = 3
_MIN_SHARE = 0.5
_OFFSETS_TRIED = 8
# a few frames in a row may differ: a blend, a caption, a cut that one of the two places later
_MAX_GAP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """The hashed frames of a video: times (n,) float64 in seconds, ascending, and hashes (n,) uint64."""

    times_s: np.ndarray
    hashes: np.ndarray

    @classmethod
    def of_segments(cls, bounds: np.ndarray, hashes: np.ndarray) -> Frames:
        """Put the frames of segments in order, each moment once.

        Args:
            bounds: (segments, 2) seconds.
            hashes: (segments, frames) uint64, of the middles of equal spans of each.
        """
        spans = (np.arange(hashes.shape[1]) + 0.5) / max(hashes.shape[1], 1)
        times = bounds[:, :1] + spans * (bounds[:, 1:] - bounds[:, :1])
        # overlapping segments show the same frames
        unique, first = np.unique(np.round(times.ravel(), 2), return_index=True)
        return cls(times_s=unique, hashes=hashes.ravel()[first])


@dataclass(frozen=True, slots=True)
class Overlap:
    """A stretch of one video and the stretch of another that shows the same, in seconds."""

    start_s: float
    end_s: float
    other_start_s: float
    other_end_s: float


def liken(hashes: np.ndarray, look: int) -> np.ndarray:
    """Return (segments,) how like a hash their frames (segments, frames) are, 1 at most; 0 if unlike."""
    if not hashes.size:
        return np.zeros(len(hashes))
    nearest = distances(hashes, np.full(1, look, np.uint64)).min(axis=1)
    likeness: np.ndarray = np.where(nearest <= MAX_DISTANCE, 1 - nearest / 64, 0.0)
    return likeness


def find_overlap(video: Frames, other: Frames, start_s: float, end_s: float) -> Overlap | None:
    """Return the stretch around a moment of a video that another video shows, too; None if it does not.

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
    best: tuple[int, Overlap] | None = None
    for offset_s in _likely_offsets(video, other, anchor, step_s):
        found = _grow(video, other, anchor, offset_s, step_s)
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    return None if best is None else best[1]


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


def _grow(
    video: Frames, other: Frames, anchor: np.ndarray, offset_s: float, step_s: float
) -> tuple[int, Overlap] | None:
    """Return how many frames are alike in the run through the moment at one distance in time, and the run."""
    is_like = _alike(video, other, offset_s, 0.75 * step_s)
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
    count = int(np.count_nonzero(is_like[first : last + 1]))
    start_s = max(0.0, float(video.times_s[first]) - step_s / 2)
    end_s = float(video.times_s[last]) + step_s / 2
    other_start_s = max(0.0, start_s + offset_s)
    return count, Overlap(start_s, end_s, other_start_s, max(other_start_s, end_s + offset_s))


def _alike(video: Frames, other: Frames, offset_s: float, reach_s: float) -> np.ndarray:
    """Return (frames,) whether the other video shows a like frame at that distance in time, or nearly."""
    wanted = video.times_s + offset_s
    right = np.searchsorted(other.times_s, wanted)
    is_like = np.zeros(len(wanted), bool)
    for shift in (-1, 0, 1):
        place = np.clip(right + shift, 0, len(other.times_s) - 1)
        is_near = np.abs(other.times_s[place] - wanted) <= reach_s
        is_like |= is_near & (distances(video.hashes, other.hashes[place]) <= MAX_DISTANCE)
    return is_like
