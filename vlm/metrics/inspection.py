"""What a score matrix looks like beyond its ranks: right scores beside wrong ones, hubs, what comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.metrics.matrices import Floats, Ints, check_matrix, promote, row_blocks
from vlm.metrics.positives import Positives


@dataclass(frozen=True, slots=True)
class ScoreHistogram:
    """Scores by value: bin i holds those in ``[edges[i], edges[i + 1])``, the last bin its upper edge too.

    Attributes:
        edges: (bins + 1,) ascending, of equal width.
        positives: Scores of right pairs in each bin; (bins,) int64.
        negatives: Scores of all other pairs; (bins,) int64.
    """

    edges: Floats
    positives: Ints
    negatives: Ints


@dataclass(frozen=True, slots=True)
class FirstItems:
    """What stands first for each query; all arrays are (queries,).

    Attributes:
        first: Column of the highest score; of tied ones a wrong item, if there is one.
        right: Column of the best positive.
        first_score: Score of ``first``.
        right_score: Score of ``right``.
        margin: By how much the best positive is above the best wrong item, negative if below; infinite if
            every item is right.
    """

    first: Ints
    right: Ints
    first_score: Floats
    right_score: Floats
    margin: Floats


def score_histogram(scores: NDArray[Any], positives: Positives, bins: int = 40) -> ScoreHistogram:
    """Count the scores of right and of wrong pairs by value, from the lowest score to the highest.

    Args:
        scores: (queries, items), finite.
        positives: The right items of each query.
        bins: How many; if all scores are equal they lie in the middle of a range of 1.

    Raises:
        ValueError: The matrix is empty or does not fit the positives.
    """
    _check_fit(scores, positives)
    low, high = np.inf, -np.inf
    for start, stop in row_blocks(*scores.shape):
        block = promote(scores[start:stop])
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    every, right = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for start, stop in row_blocks(*scores.shape):
        block = promote(scores[start:stop])
        every += np.histogram(block, edges)[0]
        right += np.histogram(block[_right(positives, start, stop)], edges)[0]
    return ScoreHistogram(edges, right, every - right)


def occurrences(scores: NDArray[Any], k: int) -> Floats:
    """Return for how many queries each item is among the first k, in the mean over all orders of tied items.

    Args:
        scores: (queries, items), finite.
        k: At least 1, and less than there are items.

    Returns:
        (items,), which sum to k times the number of queries.

    Raises:
        ValueError: The matrix is empty, or k is out of range.
    """
    check_matrix(scores)
    if not 1 <= k < scores.shape[1]:
        raise ValueError(f"expected 1 <= k < {scores.shape[1]}, the number of items, got {k}")
    total = np.zeros(scores.shape[1])
    for start, stop in row_blocks(*scores.shape):
        block = promote(scores[start:stop])
        cut = np.partition(block, -k, axis=1)[:, -k, None]
        above, tied = block > cut, block == cut
        places = k - np.count_nonzero(above, axis=1)
        total += above.sum(axis=0) + (tied * (places / np.count_nonzero(tied, axis=1))[:, None]).sum(axis=0)
    return total


def skewness(values: ArrayLike) -> float | None:
    """Return the third standardised moment, ``mean((x - m)^3) / mean((x - m)^2)^1.5``; None of equal values.

    Of `occurrences` it says how much of a gallery's hits go to a few items: about 0 if to all alike.

    Source: Radovanović et al. 2010, Hubs in Space, section 2.
    """
    array = np.asarray(values, np.float64)
    centred = array - float(array.mean())
    variance = float(np.mean(centred**2))
    largest = float(np.abs(array).max())
    if variance <= (1e-12 * largest) ** 2:
        return None
    return float(np.mean(centred**3) / variance**1.5)


def first_items(scores: NDArray[Any], positives: Positives) -> FirstItems:
    """Return what stands first for each query, and its best positive.

    Args:
        scores: (queries, items), finite.
        positives: The right items of each query.

    Raises:
        ValueError: The matrix is empty or does not fit the positives.
    """
    _check_fit(scores, positives)
    found = FirstItems(*(np.zeros(len(scores), kind) for kind in (np.int64, np.int64, float, float, float)))
    for start, stop in row_blocks(*scores.shape):
        block = promote(scores[start:stop])
        mask = np.zeros(block.shape, bool)
        mask[_right(positives, start, stop)] = True
        of_right, of_wrong = (np.where(kept, block, -np.inf) for kept in (mask, ~mask))
        right, wrong = of_right.argmax(axis=1), of_wrong.argmax(axis=1)
        best, other = of_right.max(axis=1), of_wrong.max(axis=1)
        found.first[start:stop] = np.where(other >= best, wrong, right)
        found.right[start:stop] = right
        found.first_score[start:stop] = np.maximum(best, other)
        found.right_score[start:stop] = best
        found.margin[start:stop] = best - other
    return found


def _right(positives: Positives, start: int, stop: int) -> tuple[Ints, Ints]:
    """Return rows, counted from ``start``, and columns of the right pairs of some queries."""
    pairs = slice(positives.offsets[start], positives.offsets[stop])
    rows = np.repeat(np.arange(stop - start, dtype=np.int64), positives.sizes[start:stop])
    return rows, positives.items[pairs]


def _check_fit(scores: NDArray[Any], positives: Positives) -> None:
    check_matrix(scores)
    expected = (len(positives), positives.num_items)
    if scores.shape != expected:
        raise ValueError(f"expected scores {expected} as in the positives, got {scores.shape}")
