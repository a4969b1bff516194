"""Every measure against a second implementation in plain loops, on a thousand random matrices, and by hand.

The loops walk the places of a ranking one by one and keep exact fractions; they share no formula with the
prefix sums and counts of the package.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics import Positives, chance_counts, rank_candidates, rank_scores, top_candidates

DEPTH = 10


def _groups_by_place(row, right):
    """For each place of the ranking: number of its tie group, group's size, positives in it."""
    places = []
    for number, value in enumerate(sorted(set(row), reverse=True)):
        members = [item for item, score in enumerate(row) if score == value]
        places += [(number, len(members), sum(item in right for item in members))] * len(members)
    return places


def plain_measures(row, right):
    """R@k for every k, expected best rank, nDCG@10 and average precision of one query."""
    places = _groups_by_place(row, right)
    recalls, missed, drawn = [], Fraction(1), 0
    for place, (group, size, hits) in enumerate(places):
        drawn = 0 if place == 0 or places[place - 1][0] != group else drawn + 1
        missed *= Fraction(max(size - hits - drawn, 0), size - drawn)
        recalls.append(1 - missed)
    rank = 1 + sum(1 - recall for recall in recalls)
    gain = sum(hits / size / math.log2(place + 2) for place, (_, size, hits) in enumerate(places[:DEPTH]))
    ideal = sum(1 / math.log2(place + 2) for place in range(min(len(right), DEPTH)))
    precision = Fraction(0)
    for place, (group, size, hits) in enumerate(places):
        together = Fraction(hits, size)
        for other, other_size, other_hits in places[:place]:
            if other == group:
                together += Fraction(hits, size) * Fraction(max(hits - 1, 0), max(size - 1, 1))
            else:
                together += Fraction(hits, size) * Fraction(other_hits, other_size)
        precision += together / (place + 1)
    return [float(recall) for recall in recalls], float(rank), gain / ideal, float(precision / len(right))


def _problem(seed):
    """A random matrix with few or many ties, and one to all items right for a query."""
    random = np.random.default_rng(seed)
    queries, items = random.integers(1, 5), random.integers(1, 15)
    levels = random.choice([1, 2, 4, 1000])
    scores = random.integers(-levels, levels + 1, (queries, items)).astype(
        random.choice([np.float32, np.int8])
    )
    lists = [
        random.choice(items, random.integers(1, items + 1), replace=False).tolist() for _ in range(queries)
    ]
    return scores, lists


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_thousand_matrices(seed):
    scores, lists = _problem(seed)
    counts = rank_scores(scores, Positives.from_lists(lists, scores.shape[1]))
    for query, right in enumerate(lists):
        recalls, rank, gain, precision = plain_measures(scores[query].tolist(), set(right))
        ours = [counts.recall(k)[query] for k in range(1, scores.shape[1] + 1)]
        assert ours == pytest.approx(recalls, abs=1e-12)
        assert counts.expected_rank()[query] == pytest.approx(rank, abs=1e-12)
        assert counts.ndcg[query] == pytest.approx(gain, abs=1e-12)
        assert counts.average_precision[query] == pytest.approx(precision, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_loops_are_the_mean_over_all_orders(seed):
    """The second implementation itself, and ours, against every order that the ties allow."""
    random = np.random.default_rng(seed)
    items = int(random.integers(1, 7))
    row = random.integers(0, 3, items).tolist()
    right = set(random.choice(items, random.integers(1, items + 1), replace=False).tolist())
    gains, precisions = [], []
    for order in itertools.permutations(range(items)):
        if any(row[a] < row[b] for a, b in itertools.pairwise(order)):
            continue
        hits = [item in right for item in order]
        ideal = sum(1 / math.log2(place + 2) for place in range(len(right)))
        gains.append(sum(hit / math.log2(place + 2) for place, hit in enumerate(hits)) / ideal)
        found = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
        precisions.append(sum(found) / len(right))
    _, _, gain, precision = plain_measures(row, right)
    assert [gain, precision] == pytest.approx([np.mean(gains), np.mean(precisions)], abs=1e-12)
    counts = rank_scores(np.asarray([row]), Positives.from_lists([sorted(right)], items))
    assert counts.ndcg[0] == pytest.approx(np.mean(gains), abs=1e-12)
    assert counts.average_precision[0] == pytest.approx(np.mean(precisions), abs=1e-12)


def test_without_ties_they_are_scikit_learns():
    from sklearn.metrics import average_precision_score, ndcg_score

    random = np.random.default_rng(5)
    scores, truth = random.standard_normal((200, 40)), random.random((200, 40)) < 0.1
    truth[np.arange(200), random.integers(0, 40, 200)] = True
    counts = rank_scores(scores, Positives.from_matrix(truth))
    expected = [average_precision_score(right, row) for right, row in zip(truth, scores, strict=True)]
    assert counts.average_precision == pytest.approx(expected, abs=1e-12)
    gains = [
        ndcg_score(right[None], row[None], k=10) for right, row in zip(truth.astype(int), scores, strict=True)
    ]
    assert counts.ndcg == pytest.approx(gains, abs=1e-12)


def test_many_positives_a_query_are_sorted_and_few_are_compared():
    """Seventy captions of a video take the other way through; the measures do not show it."""
    random = np.random.default_rng(6)
    scores = random.integers(0, 30, (3, 200)).astype(np.float32)
    lists = [random.choice(200, size, replace=False).tolist() for size in (70, 64, 1)]
    counts = rank_scores(scores, Positives.from_lists(lists, 200))
    for query, right in enumerate(lists):
        *_, gain, precision = plain_measures(scores[query].tolist(), set(right))
        assert counts.ndcg[query] == pytest.approx(gain, abs=1e-12)
        assert counts.average_precision[query] == pytest.approx(precision, abs=1e-12)


def test_a_perfect_order_is_exactly_one():
    scores = -np.arange(50.0)[None]
    counts = rank_scores(scores, Positives.from_lists([list(range(20))], 50))
    assert (counts.ndcg[0], counts.average_precision[0]) == (1.0, pytest.approx(1.0, abs=1e-15))
    assert counts.average_precision[0] <= 1.0


def test_chance_is_what_a_collapsed_model_reaches():
    positives = Positives.from_lists([[0], [1, 2, 3], list(range(12))], 30)
    chance, flat = chance_counts(positives), rank_scores(np.zeros((3, 30)), positives)
    for name in ("above", "tied", "tied_positives", "ndcg", "average_precision"):
        assert getattr(chance, name) == pytest.approx(getattr(flat, name))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14))
def test_candidates(seed, k):
    """What lies outside the candidates counts as never found; below ten places there is no nDCG@10."""
    scores, lists = _problem(seed)
    items = scores.shape[1]
    positives = Positives.from_lists(lists, items)
    candidates, _ = top_candidates(np.random.default_rng(seed).standard_normal(scores.shape), k)
    chosen = np.take_along_axis(scores, candidates, axis=1)
    counts = rank_candidates(candidates, chosen, positives)
    below = np.full(scores.shape, -1000, np.float32)
    np.put_along_axis(below, candidates, chosen.astype(np.float32), axis=1)
    assert (counts.ndcg is None) == (candidates.shape[1] < min(DEPTH, items))
    assert (counts.average_precision is None) == (candidates.shape[1] < items)
    for query, right in enumerate(lists):
        inside = set(right) & set(candidates[query].tolist())
        recalls, _, gain, precision = plain_measures(below[query].tolist(), inside or {-1})
        depth = candidates.shape[1]
        found = [counts.recall(place)[query] for place in range(1, depth + 1)]
        assert found == pytest.approx(recalls[:depth] if inside else [0.0] * depth, abs=1e-12)
        if counts.ndcg is not None:
            ideal = [
                sum(1 / math.log2(p + 2) for p in range(min(len(s), DEPTH))) for s in (inside or {1}, right)
            ]
            assert counts.ndcg[query] == pytest.approx(gain * ideal[0] / ideal[1] if inside else 0, abs=1e-12)
        if counts.average_precision is not None:
            assert counts.average_precision[query] == pytest.approx(precision, abs=1e-12)
