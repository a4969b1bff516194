"""Frame numbers against examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.frame_sampling import (
    dense_frames,
    dense_view,
    grid_step,
    grid_times,
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


@pytest.mark.parametrize(
    ("segment_s", "stride_s", "num_frames", "step_s"),
    [
        (8, 4, 8, 1.0),
        (8, 8, 8, 1.0),
        (8, 3, 8, 1.0),
        (10, 4, 8, 1.0),  # 1.25 s would do for the length, but not divide the stride
        (8, 0.5, 8, 0.5),
        (8, 6.5, 8, 6.5 / 7),
        (4, 1.2, 10, 0.4),  # neither is a float's exact value
        (1e9, 1e9, 8, 1.25e8),
    ],
)
def test_the_step_divides_the_stride_and_gives_a_segment_its_frames(
    segment_s, stride_s, num_frames, step_s
) -> None:
    step = grid_step(segment_s, stride_s, num_frames)
    assert step == pytest.approx(step_s)
    assert stride_s / step == pytest.approx(round(stride_s / step))
    # the next longer step that divides the stride would leave a segment too few
    assert segment_s / step >= num_frames - 1e-6
    longer = stride_s / (round(stride_s / step) - 1) if stride_s / step > 1.5 else np.inf
    assert segment_s / longer < num_frames


@pytest.mark.parametrize("values", [(0, 4, 8), (8, 0, 8), (8, 4, 0), (np.nan, 4, 8), (8, np.inf, 8)])
def test_a_grid_needs_lengths(values) -> None:
    with pytest.raises(ValueError, match="above 0 s and at least 1 frame"):
        grid_step(*values)


def test_times_of_the_grid_are_the_nearest_inside() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        step, num_frames = rng.uniform(0.1, 3), int(rng.integers(1, 12))
        start = rng.uniform(0, 50)
        end = start + rng.choice([rng.uniform(0.05, 1), rng.uniform(1, 40)])
        (found,) = grid_times([(start, end)], num_frames, step)
        inside = [t for t in ((k + 0.5) * step for k in range(2000)) if start <= t < end]
        if not inside:
            assert found.tolist() == [(start + end) / 2] * num_frames
            continue
        for place, time in enumerate(found.tolist()):
            middle = start + (place + 0.5) * (end - start) / num_frames
            assert min(abs(t - time) for t in inside) < 1e-9
            assert abs(time - middle) <= min(abs(t - middle) for t in inside) + 1e-9
        assert (np.diff(found) >= 0).all()


def test_segments_that_overlap_share_the_times_of_the_grid() -> None:
    times = grid_times([(4 * i, 4 * i + 8) for i in range(1000)], 8, 1.0)
    assert (times == 4 * np.arange(1000)[:, None] + np.arange(8) + 0.5).all()
    # rounding: 0.4 and 1.2 are no floats, yet every time is one of the grid, and four are new each time
    step = grid_step(3.2, 1.6, 8)
    times = grid_times([(1.6 * i, 1.6 * i + 3.2) for i in range(5000)], 8, step)
    assert len(np.unique(times)) == 4 * 5000 + 4
    # the last segment ends with the video and lies on the grid as it comes: still all of it are different
    (last,) = grid_times([(13.5, 21.5)], 8, 1.0)
    assert len(set(last.tolist())) == 8 and ((last >= 13.5) & (last < 21.5)).all()


def test_segments_half_a_step_off_the_grid_skip_none_of_its_times() -> None:
    # each wanted time lies between two of the grid, and rounding pushes it to either side
    starts = 0.2 + 0.4 * np.arange(2000)
    times = grid_times(np.stack([starts, starts + 3.2], axis=1), 8, 0.4)
    np.testing.assert_allclose(times, starts[:, None] + 0.4 * np.arange(8), atol=1e-9)


def test_a_short_segment_gets_what_it_holds() -> None:
    assert grid_times([(0.4, 2.2)], 4, 1.0).tolist() == [[0.5, 1.5, 1.5, 1.5]]
    assert grid_times([(3.0, 3.5)], 2, 1.0).tolist() == [[3.25, 3.25]]  # it ends where 3.5 is on
    assert grid_times([(3.5, 4.0)], 2, 1.0).tolist() == [[3.5, 3.5]]
    assert grid_times([], 2, 1.0).shape == (0, 2)
    with pytest.raises(ValueError, match="end > start"):
        grid_times([(0.0, 1.0), (2.0, 2.0)], 2, 1.0)
