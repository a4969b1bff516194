"""Averages over views and accuracies worked out by hand."""

import math

import numpy as np
import pytest

from vlm.metrics.classification import average_views, class_accuracy, confusion, top_hits


def test_views_are_averaged_after_the_softmax():
    # softmax of (0, ln 3) is (1/4, 3/4), of (ln 9, 0) is (9/10, 1/10)
    logits = [[[0.0, math.log(3)], [math.log(9), 0.0]]]
    assert average_views(logits) == pytest.approx(np.array([[(0.25 + 0.9) / 2, (0.75 + 0.1) / 2]]))
    # one confident view outweighs two undecided ones, which logits of any size would not change
    logits = [[[1000.0, 0.0], [0.0, 0.1], [0.0, 0.1]]]
    assert average_views(logits)[0, 0] > 0.6
    assert average_views(np.zeros((3, 2, 5))) == pytest.approx(np.full((3, 5), 0.2))


def test_hits_among_the_best_k():
    scores = [[0.1, 0.5, 0.4], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]
    assert top_hits(scores, [1, 1, 2], 1).tolist() == [1, 0, 0]
    assert top_hits(scores, [1, 1, 2], 2).tolist() == [1, 1, 1]
    assert top_hits(scores, [0, 0, 1], 2).tolist() == [0, 0, 0]
    assert top_hits(scores, [0, 0, 1], 3).tolist() == [1, 1, 1]


def test_ties_count_by_their_chance():
    assert top_hits([[1.0, 1.0, 1.0, 1.0]], [2], 1).tolist() == [0.25]
    assert top_hits([[1.0, 1.0, 1.0, 1.0]], [2], 3).tolist() == [0.75]
    assert top_hits([[2.0, 1.0, 1.0, 0.0]], [1], 2).tolist() == [0.5]  # the last of two places, for two
    # a constant model reaches chance, not a lucky class's share
    labels = np.array([0] * 90 + [1] * 10)
    assert top_hits(np.zeros((100, 2)), labels, 1).mean() == 0.5


def test_the_mean_over_classes_weighs_rare_classes_alike():
    labels = [0, 0, 0, 4]
    hits = [1.0, 1.0, 0.0, 0.0]
    assert class_accuracy(hits, labels) == pytest.approx(
        np.array([2 / 3, 0.0])
    )  # classes 1 to 3 do not occur


def test_confusion_counts():
    table = confusion([1, 1, 0, 2], [0, 1, 0, 2], 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("scores", "labels", "k"),
    [
        ([[0.1, 0.2]], [2], 1), ([[0.1, 0.2]], [-1], 1), ([[0.1, 0.2]], [0], 3), ([[0.1, 0.2]], [0], 0),
        ([[0.1, np.nan]], [0], 1), ([[0.1, 0.2]], [0, 1], 1), ([], [], 1),
    ],
)  # fmt: skip
def test_impossible_scores_are_refused(scores, labels, k):
    with pytest.raises(ValueError, match="expected|finite"):
        top_hits(scores, labels, k)


def test_impossible_views_are_refused():
    with pytest.raises(ValueError, match="expected logits"):
        average_views(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="not finite"):
        average_views(np.full((1, 1, 2), np.inf))
    with pytest.raises(ValueError, match="a hit and a label"):
        class_accuracy([1.0], [0, 1])
