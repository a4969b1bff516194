"""Which frames of a clip the encoder sees: pure functions of counts, times and a random generator."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


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
    # half a microsecond is below any frame gap, and above the rounding of times kept as floats
    first, last = np.searchsorted(times_s, np.array([start_s, end_s]) - 5e-7, side="left").tolist()
    if first == last:
        on_screen = int(np.searchsorted(times_s, start_s, side="right")) - 1
        first = min(max(on_screen, 0), len(times_s) - 1)
        last = first + 1
    return middle_frames(last - first, num_frames) + np.int64(first)


def _spans(num_available: int, num_frames: int) -> tuple[Indices, Indices]:
    """Split the clip into spans of at least one frame each: [starts, ends)."""
    if num_available < 1 or num_frames < 1:
        raise ValueError(f"expected counts of at least 1, got {num_available} available, {num_frames} wanted")
    bounds = np.linspace(0, num_available, min(num_available, num_frames) + 1).astype(np.int64)
    return bounds[:-1], bounds[1:]


def _repeat_last(indices: Indices, num_frames: int) -> Indices:
    return np.asarray(np.pad(indices, (0, num_frames - len(indices)), mode="edge"), np.int64)
