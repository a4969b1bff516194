"""Histogram, hubs and first items against counts done one by one, and formulas of other libraries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from vlm.metrics import Positives, first_items, matrices, occurrences, score_histogram, skewness


@pytest.fixture(params=[2**26, 8 * 3 * 30], ids=["one block", "blocks of three rows"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_BYTES", request.param)


@pytest.fixture
def matrix(blocks):
    random = np.random.default_rng(0)
    scores = random.standard_normal((25, 30)).astype(np.float32)
    positives = Positives.from_lists(
        [random.choice(30, size=1 + query % 3, replace=False).tolist() for query in range(25)], 30
    )
    return scores, positives


def test_every_score_lies_in_its_bin(matrix):
    scores, positives = matrix
    found = score_histogram(scores, positives, bins=7)
    assert (found.edges[0], found.edges[-1]) == (scores.min(), scores.max())
    counts = {True: [0] * 7, False: [0] * 7}
    for query, item in itertools.product(range(25), range(30)):
        value = float(scores[query, item])
        place = max(number for number in range(7) if value >= found.edges[number])
        counts[item in positives[query]][place] += 1
    assert found.positives.tolist() == counts[True]
    assert found.negatives.tolist() == counts[False]
    assert found.positives.sum() == positives.sizes.sum()


def test_equal_scores_lie_in_one_bin(blocks):
    found = score_histogram(np.full((4, 4), 3, np.int8), Positives.from_lists([[0]] * 4, 4), bins=5)
    assert found.edges.tolist() == pytest.approx([2.5, 2.7, 2.9, 3.1, 3.3, 3.5])
    assert (found.positives.tolist(), found.negatives.tolist()) == ([0, 0, 4, 0, 0], [0, 0, 12, 0, 0])


def test_occurrences_without_ties_are_those_of_a_sort(matrix):
    scores, _ = matrix
    expected = np.zeros(30)
    for row in scores:
        for item in sorted(range(30), key=lambda column: -row[column])[:10]:
            expected[item] += 1
    assert occurrences(scores, 10).tolist() == expected.tolist()


def test_occurrences_are_the_mean_over_all_orders_of_tied_items(blocks):
    scores = np.array([[2, 1, 1, 1], [0, 0, 0, 0], [3, 3, 1, 0]], np.int64)
    for k in (1, 2, 3):
        expected = np.zeros(4)
        orders = list(itertools.permutations(range(4)))
        for row, order in itertools.product(scores, orders):
            for item in sorted(order, key=lambda column: -row[column])[:k]:
                expected[item] += 1 / len(orders)
        found = occurrences(scores, k)
        assert found == pytest.approx(expected)
        assert found.sum() == pytest.approx(3 * k)


@pytest.mark.parametrize("k", [0, 4, 5])
def test_more_places_than_items_are_refused(k):
    with pytest.raises(ValueError, match="1 <= k < 4"):
        occurrences(np.zeros((2, 4)), k)


def test_skewness_is_that_of_scipy():
    values = np.random.default_rng(1).lognormal(size=500)
    assert skewness(values) == pytest.approx(float(scipy.stats.skew(values)), rel=1e-12)
    assert skewness([1, 2, 3]) == pytest.approx(0)
    assert skewness([0, 0, 0, 4]) == pytest.approx(2 / np.sqrt(3))
    assert skewness([0.1 + 0.2, 0.3, 0.3]) is None


def test_a_hub_is_seen():
    """One item is near to every query: the third moment finds it, the mean cannot."""
    scores = np.random.default_rng(2).standard_normal((200, 100))
    alike = skewness(occurrences(scores, 10))
    scores[:, 17] += 9
    hubs = occurrences(scores, 10)
    assert hubs.argmax() == 17
    assert hubs[17] == 200
    assert skewness(hubs) > 5 > abs(alike)


def test_first_items(blocks):
    scores = np.array([[5, 9, 1], [5, 5, 1], [2, 8, 8], [1, 2, 3]], np.float64)
    positives = Positives.from_lists([[0], [1], [1, 2], [0, 1, 2]], 3)
    found = first_items(scores, positives)
    assert found.first.tolist() == [1, 0, 1, 2]  # where right and wrong tie, the wrong one is shown
    assert found.right.tolist() == [0, 1, 1, 2]
    assert found.first_score.tolist() == [9, 5, 8, 3]
    assert found.right_score.tolist() == [5, 5, 8, 3]
    assert found.margin.tolist() == [-4, 0, 6, np.inf]


def test_a_matrix_of_other_shape_is_refused():
    positives = Positives.from_lists([[0], [1]], 2)
    for measure in (score_histogram, first_items):
        with pytest.raises(ValueError, match=r"expected scores \(2, 2\)"):
            measure(np.zeros((3, 2)), positives)
