"""Overlaps, ranked windows and highlights: by hand, by counting cells, and by the released evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.metrics import highlight_measures, moment_measures, overlaps
from vlm.metrics.moments import MEAN_IOUS, highlight_precision, window_precision

WINDOW = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)
WINDOWS = st.lists(WINDOW, max_size=6)


def shared_cells(first, second):
    """Intersection over union of two windows with whole ends, counted in cells of one second."""
    left, right = (set(range(*window)) for window in (first, second))
    return len(left & right) / len(left | right) if left & right else 0.0


def slow_precision(windows, truths, level):
    """Return the interpolated average precision by its definition, a window and a recall at a time."""
    left, marks = list(range(len(truths))), []
    for window in windows:
        fitting = [place for place in left if shared_cells(window, truths[place]) >= level]
        best = max(fitting, key=lambda place: (shared_cells(window, truths[place]), -place), default=None)
        marks.append(best is not None)
        if best is not None:
            left.remove(best)
    points = [(sum(marks[:n]) / len(truths), sum(marks[:n]) / n) for n in range(1, len(marks) + 1)]
    recalls = sorted({recall for recall, _ in points if recall > 0})
    total, before = 0.0, 0.0
    for recall in recalls:
        total += (recall - before) * max(precision for other, precision in points if other >= recall)
        before = recall
    return total


@given(WINDOWS, WINDOWS)
def test_overlaps_are_those_of_counted_cells(first, second):
    expected = [[shared_cells(a, b) for b in second] for a in first]
    assert overlaps(first, second) == pytest.approx(np.asarray(expected).reshape(len(first), len(second)))


@given(WINDOWS, st.lists(WINDOW, min_size=1, max_size=4), st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]))
def test_precision_is_that_of_the_definition(windows, truths, level):
    assert window_precision(windows, truths, [level])[0] == pytest.approx(
        slow_precision(windows, truths, level)
    )


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=9),
)
def test_highlight_precision_is_that_of_the_definition(clips):
    scores, right = zip(*clips, strict=True)
    points = []
    for lowest in sorted(set(scores), reverse=True):
        chosen = [is_right for score, is_right in clips if score >= lowest]
        points.append((sum(chosen), sum(chosen) / len(chosen)))
    rising = [
        max(precision for _, precision in points[place:])
        for place, (found, _) in enumerate(points)
        if found > (points[place - 1][0] if place else 0)
    ]
    expected = sum(rising) / len(rising) if rising else 0.0
    assert highlight_precision(scores, right) == pytest.approx(expected)


def test_a_query_by_hand():
    """Two true windows; the first guess overlaps one by 6/10, the second by 8/10, the third is the other."""
    truth = [[10, 20], [40, 44]]
    windows = [[14, 20, 0.9], [12, 20, 0.8], [40, 44, 0.7]]
    found = moment_measures([windows], [truth], recall_at=(1, 5), ious=(0.3, 0.5, 0.7), mean_at=(0.5, 0.75))
    values = {name: float(column[0]) for name, column in found.items()}
    assert values["miou"] == 0.6
    assert (values["recall@1@0.3"], values["recall@1@0.5"], values["recall@1@0.7"]) == (1, 1, 0)
    assert (values["recall@5@0.5"], values["recall@5@0.7"]) == (1, 1)
    # at 0.5: right, a second guess at the same window is wrong, right: recall 1/2 at 1, 1 at 2/3
    assert values["map@0.5"] == pytest.approx((1 + 2 / 3) / 2)
    # at 0.75: wrong, right, right; interpolated, 2/3 holds for both halves
    assert values["map@0.75"] == pytest.approx(2 / 3)
    # 0.5 to 0.6 as at 0.5; 0.65 to 0.8 as at 0.75; beyond, only the third: 1/3 for half
    assert values["map"] == pytest.approx((3 * 5 / 6 + 4 * 2 / 3 + 3 * 1 / 6) / 10)


def test_an_overlap_that_just_suffices_counts():
    for level in MEAN_IOUS:
        hundredths = round(100 * level)
        assert window_precision([[0, hundredths]], [[0, 100]], [level])[0] == 1
        assert window_precision([[0, hundredths - 1]], [[0, 100]], [level])[0] == 0


def test_what_overlaps_nothing():
    assert overlaps([[3, 3], [5, 2]], [[3, 3], [0, 9], [5, 2]]).max() == 0
    found = moment_measures([[], [[0, 4, 1.0]]], [[[0, 4]], [[7, 5]]])
    assert all((column == 0).all() for column in found.values())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="a true window"):
        window_precision([[0, 1]], [], [0.5])
    with pytest.raises(ValueError, match=r"thresholds in \(0, 1\]"):
        window_precision([[0, 1]], [[0, 1]], [0.0])
    with pytest.raises(ValueError, match="for each of 2 queries"):
        moment_measures([[]], [[[0, 1]], [[0, 1]]])
    with pytest.raises(ValueError, match="a score for each rated clip"):
        highlight_measures([[1.0]], [[[1], [2]]], 2)


def test_highlights_by_hand():
    ratings = [[4, 0, 2], [1, 1, 1], [3, 3, 0], [0, 0, 0]]
    found = highlight_measures([[0.1, 0.9, 0.5, 0.2]], [ratings], 2)
    # order: clips 1, 2, 3, 0. first person: 2 and 0: 1/2, 2/4; second: 2 alone: 1/2; third: 0 alone: 1/4
    assert found["map"][0] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert found["hit@1"][0] == 0
    assert highlight_measures([[0, 0, 1, 0]], [ratings], 3)["hit@1"][0] == 1
    assert highlight_measures([[1, 1, 1, 1]], [ratings], 3)["hit@1"][0] == 0.5  # of equal ones, a share
    assert highlight_measures([[1, 2, 3, 4]], [ratings], 5)["map"][0] == 0


def test_the_released_evaluation_says_the_same(fixtures):
    """Every figure of QVHighlights' own evaluation, on queries that were made up for the purpose."""
    made = json.loads((fixtures / "moments_official.json").read_text())
    truths = [row["relevant_windows"] for row in made["truth"]]
    windows = [row["pred_relevant_windows"] for row in made["predictions"]]
    found = moment_measures(windows, truths, recall_at=(1,), ious=MEAN_IOUS, mean_at=MEAN_IOUS)
    for level in MEAN_IOUS:
        name, wanted = f"{level:g}", made["metrics"]["full"]
        assert 100 * found[f"recall@1@{name}"].mean() == pytest.approx(wanted["MR-R1"][name], abs=0.0051)
        assert 100 * found[f"map@{name}"].mean() == pytest.approx(wanted["MR-mAP"][name], abs=0.0051)
    assert 100 * found["map"].mean() == pytest.approx(wanted["MR-mAP"]["average"], abs=0.0051)
    ratings = []
    for row in made["truth"]:
        table = np.zeros((int(row["duration"] / 2), 3))
        table[row["relevant_clip_ids"]] = row["saliency_scores"]
        ratings.append(table)
    scores = [row["pred_saliency_scores"] for row in made["predictions"]]
    for lowest, name in ((2, "Fair"), (3, "Good"), (4, "VeryGood")):
        block, wanted = highlight_measures(scores, ratings, lowest), made["metrics"][f"HL-min-{name}"]
        assert 100 * block["map"].mean() == pytest.approx(wanted["HL-mAP"], abs=0.0051)
        assert 100 * block["hit@1"].mean() == pytest.approx(wanted["HL-Hit1"], abs=0.0051)
