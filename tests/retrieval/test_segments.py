from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.retrieval.segments import cut_segments


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [
        (0.04, [(0, 0.04)]),
        (8, [(0, 8)]),
        (8.02, [(0, 8.02)]),
        (9, [(0, 8), (1, 9)]),
        (12, [(0, 8), (4, 12)]),
        (24, [(0, 8), (4, 12), (8, 16), (12, 20), (16, 24)]),
        (25.5, [(0, 8), (4, 12), (8, 16), (12, 20), (16, 24), (17.5, 25.5)]),
        (24.02, [(0, 8), (4, 12), (8, 16), (12, 20), (16, 24.02)]),
    ],
)
def test_hand_worked(duration_s: float, expected: list[tuple[float, float]]) -> None:
    segments = cut_segments(duration_s)
    assert segments == [pytest.approx(pair) for pair in expected]
    assert segments[-1][1] == duration_s


@given(
    duration_s=st.floats(0.01, 5000),
    segment_s=st.floats(0.5, 60),
    share=st.floats(0.1, 1),
)
def test_everything_is_covered_and_nothing_lies_outside(duration_s, segment_s, share) -> None:
    stride_s = segment_s * share
    segments = cut_segments(duration_s, segment_s, stride_s)
    assert segments[0][0] == 0
    assert segments[-1][1] == duration_s
    for (start, end), (next_start, next_end) in zip(segments, segments[1:], strict=False):
        assert start < next_start <= end + 1e-6
        assert next_start - start <= stride_s + 0.06
        assert end < next_end
    if len(segments) > 1:
        assert all(abs(end - start - segment_s) < 0.06 for start, end in segments)
    assert len(segments) <= math.ceil(duration_s / stride_s) + 1


@pytest.mark.parametrize(
    "arguments", [(0,), (-1,), (math.nan,), (math.inf,), (10, 0), (10, 8, 0), (10, 4, 8)]
)
def test_impossible_lengths(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"positive number of seconds|gaps"):
        cut_segments(*arguments)
