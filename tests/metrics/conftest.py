"""Independent truth for ranks: every order of the tied items, one by one, and rules as others apply them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest


def _all_orders(scores, right):
    """Rank of the best positive in each descending order of a row that its ties allow."""
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            ranks.append(min(order.index(item) for item in right) + 1)
    return np.asarray(ranks, float)


@pytest.fixture(scope="session")
def all_orders():
    return _all_orders


@pytest.fixture(scope="session")
def diagonal():
    """Positives of a square matrix with the right item on the diagonal."""
    from vlm.metrics import Positives

    return lambda n, items=None: Positives.from_lists([[i] for i in range(n)], items or n)


def _clip4clip(scores):
    """R@1 in percent: sort each row descending, subtract the diagonal, take every column that is zero."""
    ordered = np.sort(-scores, axis=1)
    place = np.where(ordered - np.diag(-scores)[:, None] == 0)[1]
    return 100 * np.mean(place == 0), len(place)


def _argsort_reversed(scores):
    """R@1 in percent by ``argsort(row)[::-1]``: the last of the tied, and every NaN, comes first."""
    first = [np.argsort(row)[::-1][0] for row in scores]
    return 100 * float(np.mean(np.asarray(first) == np.arange(len(scores))))


def _optimistic(scores):
    """R@1 in percent with every tie broken in favour of the right item."""
    return 100 * float(np.mean(np.diag(scores) >= scores.max(axis=1)))


@pytest.fixture(scope="session")
def peers():
    return {"clip4clip": _clip4clip, "argsort": _argsort_reversed, "optimistic": _optimistic}
