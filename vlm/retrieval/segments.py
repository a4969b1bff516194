"""Where a video is cut: overlapping stretches, of which each becomes one vector of the index."""

from __future__ import annotations

import math
from typing import Literal

from vlm.errors import InvalidInput

Segmentation = Literal["even", "shots"]

# a remainder shorter than this is rounding in the container, not footage worth a segment of its own
_NEGLIGIBLE_S = 0.05


def check_lengths(segment_s: float, stride_s: float) -> None:
    """Raise InvalidInput unless segments of this length and distance leave no gaps; both in seconds."""
    if not 0 < stride_s <= segment_s or math.isinf(segment_s):
        raise InvalidInput(
            f"expected 0 < stride <= segment length, got a stride of {stride_s:g} s and segments of "
            f"{segment_s:g} s"
        )


def cut_segments(
    duration_s: float, segment_s: float = 8.0, stride_s: float = 4.0
) -> list[tuple[float, float]]:
    """Return the (start, end) of overlapping segments that together cover a video.

    A video no longer than a segment is one segment. Otherwise segments begin every `stride_s`, all have
    the same length, and the last one is moved so that it ends with the video.

    Args:
        duration_s: Length of the video, in seconds; above 0.
        segment_s: Length of a segment, in seconds.
        stride_s: From one start to the next, in seconds; at most `segment_s`, so that nothing is left out.

    Returns:
        Pairs of seconds from the first frame, ascending.

    Raises:
        ValueError: A length is not positive and finite, or the stride leaves gaps.
    """
    for name, value in (("duration_s", duration_s), ("segment_s", segment_s), ("stride_s", stride_s)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number of seconds, got {value}")
    if stride_s > segment_s:
        raise ValueError(f"stride_s must be at most segment_s ({segment_s}), got {stride_s}: gaps would open")
    if duration_s <= segment_s + _NEGLIGIBLE_S:
        return [(0.0, duration_s)]
    # start * stride, not a running sum: rounding must not drift over a long video
    num_regular = math.floor((duration_s - segment_s) / stride_s + 1e-9) + 1
    segments = [(i * stride_s, min(i * stride_s + segment_s, duration_s)) for i in range(num_regular)]
    if duration_s - segments[-1][1] > _NEGLIGIBLE_S:
        segments.append((duration_s - segment_s, duration_s))
    else:
        segments[-1] = (segments[-1][0], duration_s)
    return segments
