"""Frame numbers against examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.frame_sampling import (
    dense_frames,
    dense_view,
    middle_frames,
    random_frames,
    segment_frames,
    segment_view,
    shifted_view,
)


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        # bounds 0 5 10 15 20 25 30 35 40, each span's middle is its third frame
        (40, 8, [2, 7, 12, 17, 22, 27, 32, 37]),
        # bounds int(0, 3.75, 7.5, 11.25, 15) = 0 3 7 11 15
        (15, 4, [1, 4, 8, 12]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        # bounds 0 2 4 ... 16: the earlier one of two middles
        (16, 8, [0, 2, 4, 6, 8, 10, 12, 14]),
        # too short: the last frame is repeated
        (3, 8, [0, 1, 2, 2, 2, 2, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
        (300, 1, [149]),
    ],
)
def test_middle_frames(available: int, wanted: int, expected: list[int]) -> None:
    assert middle_frames(available, wanted).tolist() == expected


@pytest.mark.parametrize(("available", "is_symmetric"), [(24, True), (40, True), (56, True), (64, False)])
def test_middle_frames_read_backwards(available: int, is_symmetric: bool) -> None:
    frames = middle_frames(available, 8)
    assert np.array_equal(available - 1 - frames[::-1], frames) == is_symmetric


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(0, 2**32))
def test_random_frames_stay_in_their_spans(available: int, wanted: int, seed: int) -> None:
    frames = random_frames(available, wanted, np.random.default_rng(seed))
    assert len(frames) == wanted
    spans = min(available, wanted)
    for number, frame in enumerate(frames[:spans].tolist()):
        # the definition in integers: int(i * n / T) without rounding trouble
        assert number * available // spans <= frame < (number + 1) * available // spans or available > 4000
    assert (frames[spans:] == available - 1).all()
    assert (np.diff(frames) >= 0).all()


def test_random_frames_reach_every_frame() -> None:
    rng = np.random.default_rng(0)
    seen = {int(f) for _ in range(300) for f in random_frames(21, 4, rng)}
    assert seen == set(range(21))


def test_segment_frames_count_only_frames_inside() -> None:
    times = np.arange(100) / 10.0
    # [2, 4) holds frames 20..39: spans of 5 from 20
    assert segment_frames(times, 2.0, 4.0, 4).tolist() == [22, 27, 32, 37]
    # the end is open: frame 40 appears at 4.0
    assert segment_frames(times, 3.9, 4.0, 2).tolist() == [39, 39]
    assert segment_frames(times, 0.0, 10.0, 8).tolist() == middle_frames(100, 8).tolist()


def test_segment_edges_survive_rounding() -> None:
    times = np.arange(300) * (1001 / 30000)
    for first in range(0, 250, 7):
        frames = segment_frames(times, round(times[first], 6), round(times[first + 8], 6), 8)
        assert frames.tolist() == list(range(first, first + 8))


def test_a_segment_between_two_frames_shows_the_one_on_screen() -> None:
    times = np.array([0.0, 1.0, 5.0])
    assert segment_frames(times, 2.0, 3.0, 3).tolist() == [1, 1, 1]
    assert segment_frames(times, 7.0, 9.0, 2).tolist() == [2, 2]


@pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan"))])
def test_empty_segments(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="end > start"):
        segment_frames(np.array([0.0, 1.0]), start, end, 2)


@pytest.mark.parametrize(("available", "wanted"), [(0, 8), (8, 0), (-1, 1)])
def test_counts_below_one(available: int, wanted: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        middle_frames(available, wanted)


def test_dense_frames_keep_their_distance_and_reach_every_start():
    starts = set()
    for seed in range(200):
        chosen = dense_frames(20, 4, 5, np.random.default_rng(seed))
        assert np.diff(chosen).tolist() == [5, 5, 5]
        starts.add(int(chosen[0]))
    assert starts == {0, 1, 2, 3, 4}  # 16 frames from the first to the last of a stretch, of 20
    assert dense_frames(6, 4, 5, np.random.default_rng(0)).tolist() == [0, 5, 5, 5]


def test_dense_views_lie_evenly_from_the_first_to_the_last_frame():
    views = [dense_view(31, 4, 5, view, 3).tolist() for view in range(3)]
    assert views == [[0, 5, 10, 15], [7, 12, 17, 22], [15, 20, 25, 30]]
    assert dense_view(31, 4, 5, 0, 1).tolist() == [7, 12, 17, 22]
    assert dense_view(3, 4, 5, 1, 2).tolist() == [0, 2, 2, 2]


def test_segment_views_by_hand():
    # (21 - 1) / 4 = 5 frames a span; the three views take a quarter, a half and three quarters of it
    views = [segment_view(21, 4, view, 3).tolist() for view in range(3)]
    assert views == [[1, 6, 11, 16], [2, 7, 12, 17], [3, 8, 13, 18]]
    assert segment_view(1, 4, 2, 3).tolist() == [0, 0, 0, 0]


def test_shifted_views_by_hand():
    views = [shifted_view(20, 4, view, 2).tolist() for view in range(2)]
    assert views == [[0, 5, 10, 15], [2, 7, 12, 17]]
    assert shifted_view(3, 4, 0, 2).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("view", [segment_view, shifted_view, lambda n, t, v, k: dense_view(n, t, 2, v, k)])
def test_views_that_do_not_exist_and_empty_clips_are_refused(view):
    for num_available in (1, 2, 7, 100, 1001):
        for number in range(10):
            chosen = view(num_available, 8, number, 10)
            assert len(chosen) == 8 and (np.diff(chosen) >= 0).all()
            assert chosen[0] >= 0 and chosen[-1] < num_available
    with pytest.raises(ValueError, match="expected a view of 0 to 2, got 3"):
        view(10, 4, 3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        view(0, 4, 0, 3)
