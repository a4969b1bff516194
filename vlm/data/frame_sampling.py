"""Which frames of a clip the encoder sees: pure functions of counts, times and a random generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
# half a microsecond is below any frame gap, and above the rounding of times kept as floats
_ROUNDING_S = 5e-7


def middle_frames(num_available: int, num_frames: int) -> Indices:
    """Return the middle frame of each of ``num_frames`` equal spans; a short clip repeats its last frame.

    With T frames of n: bounds = int(linspace(0, n, T + 1)), index = (bounds[i] + bounds[i+1] - 1) // 2. Read
    backwards this gives the mirrored frames only if n / T is an odd integer (24, 40, 56 frames for T = 8).

    Args:
        num_available: Frames in the clip; at least 1.
        num_frames: Frames wanted; at least 1.

    Returns:
        (num_frames,) ascending indices in [0, num_available).

    Raises:
        ValueError: A count is below 1.

    Source: VideoMamba (Li et al. 2024), released evaluation protocol; Temporal Segment Networks (Wang et
        al. 2016), section 3.1.
    """
    starts, ends = _spans(num_available, num_frames)
    return _repeat_last(np.asarray((starts + ends - 1) // 2, np.int64), num_frames)


def random_frames(num_available: int, num_frames: int, rng: np.random.Generator) -> Indices:
    """Return one random frame of each of ``num_frames`` equal spans (training).

    Args:
        num_available: Frames in the clip; at least 1.
        num_frames: Frames wanted; at least 1.
        rng: Source of randomness; one draw of ``min(num_available, num_frames)`` integers.

    Returns:
        (num_frames,) ascending indices in [0, num_available); a short clip repeats its last frame.

    Raises:
        ValueError: A count is below 1.
    """
    starts, ends = _spans(num_available, num_frames)
    return _repeat_last(rng.integers(starts, ends), num_frames)


def dense_frames(num_available: int, num_frames: int, stride: int, rng: np.random.Generator) -> Indices:
    """Return every ``stride``-th frame of one random stretch (training).

    Args:
        num_available: Frames in the clip; at least 1.
        num_frames: Frames wanted; at least 1.
        stride: Distance of two chosen frames; at least 1.
        rng: Source of randomness; one draw.

    Returns:
        (num_frames,) ascending indices in [0, num_available); a short clip repeats its last frame.

    Raises:
        ValueError: A count is below 1.

    Source: Feichtenhofer et al. 2019, SlowFast Networks, section 3.
    """
    last = _last_start(num_available, num_frames, stride)
    return _stretch(num_available, num_frames, stride, int(rng.integers(last + 1)))


def dense_view(num_available: int, num_frames: int, stride: int, view: int, num_views: int) -> Indices:
    """Return every ``stride``-th frame of one of several stretches that lie evenly over the clip (testing).

    One stretch lies in the middle; of several the first begins and the last ends with the clip.

    Returns:
        (num_frames,) ascending indices in [0, num_available); a short clip repeats its last frame.

    Raises:
        ValueError: A count is below 1, or there is no such view.
    """
    _check_view(view, num_views)
    last = _last_start(num_available, num_frames, stride)
    start = last // 2 if num_views == 1 else last * view // (num_views - 1)
    return _stretch(num_available, num_frames, stride, start)


def segment_view(num_available: int, num_frames: int, view: int, num_views: int) -> Indices:
    """Return one frame of each equal span, at (view + 1) / (num_views + 1) of it (testing of sparse models).

    With T frames of n, s = (n - 1) / T: index = round(s i) + int(s / (num_views + 1) (view + 1)).

    Returns:
        (num_frames,) ascending indices in [0, num_available).

    Raises:
        ValueError: A count is below 1, or there is no such view.

    Source: VideoMamba (Li et al. 2024), released testing protocol of Kinetics-400, Breakfast and COIN.
    """
    _check_view(view, num_views)
    _check_counts(num_available, num_frames)
    span = (num_available - 1) / num_frames
    starts = np.round(span * np.arange(num_frames)).astype(np.int64)
    return np.minimum(starts + int(span / (num_views + 1) * (view + 1)), num_available - 1)


def shifted_view(num_available: int, num_frames: int, view: int, num_views: int) -> Indices:
    """Return one frame of each equal span, at view / num_views of it (testing on Something-Something).

    With T frames of n, s = n / T: index = int(s (i + view / num_views)).

    Returns:
        (num_frames,) ascending indices in [0, num_available).

    Raises:
        ValueError: A count is below 1, or there is no such view.

    Source: VideoMAE (Tong et al. 2022), whose protocol VideoMamba's Something-Something V2 results follow.
    """
    _check_view(view, num_views)
    _check_counts(num_available, num_frames)
    span = num_available / num_frames
    return (view * span / num_views + span * np.arange(num_frames)).astype(np.int64)


def segment_frames(
    times_s: npt.NDArray[np.float64], start_s: float, end_s: float, num_frames: int
) -> Indices:
    """Return the frames that show the stretch [start_s, end_s) of a video, as `middle_frames` of it would.

    Args:
        times_s: (n,) ascending; when each frame of the video appears.
        start_s: Where the stretch begins, in seconds.
        end_s: Where it ends; beyond ``start_s``.
        num_frames: Frames wanted; at least 1.

    Returns:
        (num_frames,) ascending indices of frames that appear inside the stretch; where none does, the frame
        on screen at its start.

    Raises:
        ValueError: The stretch is empty, or a count is below 1.
    """
    if not end_s > start_s:
        raise ValueError(f"expected a segment with end > start, got [{start_s}, {end_s})")
    first, last = np.searchsorted(times_s, np.array([start_s, end_s]) - _ROUNDING_S, side="left").tolist()
    if first == last:
        on_screen = int(np.searchsorted(times_s, start_s, side="right")) - 1
        first = min(max(on_screen, 0), len(times_s) - 1)
        last = first + 1
    return middle_frames(last - first, num_frames) + np.int64(first)


def grid_step(segment_s: float, stride_s: float, num_frames: int) -> float:
    """Return how many seconds apart frames are taken from a video that is cut into overlapping segments.

    It is the longest step that divides the stride, so that all segments lie alike on the grid, and of which a
    segment holds ``num_frames``.

    Args:
        segment_s: Length of a segment, in seconds; above 0.
        stride_s: From one start to the next, in seconds; above 0.
        num_frames: Frames wanted of a segment; at least 1.

    Raises:
        ValueError: One of them is below that.
    """
    if not (0 < segment_s < math.inf and 0 < stride_s < math.inf and num_frames >= 1):
        raise ValueError(
            f"expected a length and a stride above 0 s and at least 1 frame, got {segment_s} s, {stride_s} s "
            f"and {num_frames} frames"
        )
    return stride_s / math.ceil(stride_s * num_frames / segment_s - 1e-9)


def grid_times(
    segments: Sequence[tuple[float, float]] | npt.NDArray[np.float64], num_frames: int, step_s: float
) -> npt.NDArray[np.float64]:
    """Return when the frames of segments are on screen, where all come from one grid over the video.

    The grid holds the middles of equal steps from the video's first frame on. A segment gets those nearest to
    the middles of its ``num_frames`` equal spans, of the ones inside it; a short segment gets some of them
    more than once. One that holds none gets its own middle, which is no time of the grid.

    Args:
        segments: (n, 2) seconds, [start, end).
        num_frames: Frames wanted of each; at least 1.
        step_s: Seconds from one time of the grid to the next; above 0.

    Returns:
        (n, num_frames) seconds, ascending within each segment.

    Raises:
        ValueError: A segment is empty.
    """
    bounds = np.asarray(segments, np.float64).reshape(-1, 2)
    starts, ends = bounds[:, :1], bounds[:, 1:]
    if not (ends > starts).all():
        raise ValueError(f"expected segments with end > start, got {bounds[(ends <= starts)[:, 0]][0]}")
    slack = _ROUNDING_S / step_s
    first = np.ceil(starts / step_s - 0.5 - slack)
    last = np.ceil(ends / step_s - 0.5 - slack) - 1
    wanted = starts + (np.arange(num_frames) + 0.5) / num_frames * (ends - starts)
    # of two as near, the earlier: a segment that begins with a time of the grid then keeps it
    steps = np.clip(np.ceil(wanted / step_s - slack) - 1, first, last)
    return np.where(first <= last, (steps + 0.5) * step_s, (starts + ends) / 2)


def _spans(num_available: int, num_frames: int) -> tuple[Indices, Indices]:
    """Split the clip into spans of at least one frame each: [starts, ends)."""
    _check_counts(num_available, num_frames)
    bounds = np.linspace(0, num_available, min(num_available, num_frames) + 1).astype(np.int64)
    return bounds[:-1], bounds[1:]


def _repeat_last(indices: Indices, num_frames: int) -> Indices:
    return np.asarray(np.pad(indices, (0, num_frames - len(indices)), mode="edge"), np.int64)


def _stretch(num_available: int, num_frames: int, stride: int, start: int) -> Indices:
    return np.minimum(start + stride * np.arange(num_frames, dtype=np.int64), num_available - 1)


def _last_start(num_available: int, num_frames: int, stride: int) -> int:
    """Return where the last whole stretch begins, 0 if none fits."""
    _check_counts(num_available, num_frames)
    if stride < 1:
        raise ValueError(f"expected a stride of at least 1, got {stride}")
    return max(0, num_available - 1 - (num_frames - 1) * stride)


def _check_counts(num_available: int, num_frames: int) -> None:
    if num_available < 1 or num_frames < 1:
        raise ValueError(f"expected counts of at least 1, got {num_available} available, {num_frames} wanted")


def _check_view(view: int, num_views: int) -> None:
    if not 0 <= view < num_views:
        raise ValueError(f"expected a view of 0 to {num_views - 1}, got {view}")
