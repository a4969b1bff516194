"""Ranks of the right items in a score matrix, as expected values under uniformly random tie order.

A sort gives tied items some order, and that order decides the published number: a model that gives every
item the same score reaches anything between 0 and 100 % by the rule of its sort. Here nothing is sorted:
a query's outcome is three counts (items above its best positive, items tied with it, positives among
those), and every measure is the exact mean over all orders of the tied items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.metrics.gains import NDCG_DEPTH, PairCounts, average_precision, ndcg
from vlm.metrics.matrices import Floats, Ints, check_finite, check_matrix, promote, row_blocks
from vlm.metrics.positives import Positives

Adjustment = Callable[[Floats, Ints], Floats]
_MOST_COMPARED = 64


@dataclass(frozen=True, slots=True)
class RankCounts:
    """Where the positives of each query stand; all arrays are (queries,), those of counts int64.

    Attributes:
        above: Items that score higher than the query's best positive.
        tied: Items that score exactly as much, the positives themselves included; at least 1, or 0 if no
            positive was scored at all (a positive outside the reranked candidates).
        tied_positives: Positives among the tied.
        num_scored: How deep the ranks are valid: the gallery's size, or k of ``itm@k``.
        num_items: The gallery's size.
        ndcg: Expected nDCG@10, over all positives; None if fewer than ten items of a larger gallery were
            scored.
        average_precision: Expected average precision, over all positives; None unless every item was scored.
    """

    above: Ints
    tied: Ints
    tied_positives: Ints
    num_scored: int
    num_items: int
    ndcg: Floats | None = None
    average_precision: Floats | None = None

    def recall(self, k: int) -> Floats:
        """Return each query's probability that a positive is among its first ``k`` items; (queries,).

        ``1 - C(tied - p, j) / C(tied, j)`` with ``j = clip(k - above, 0, tied)`` and p tied positives: of j
        items drawn from the tied at random, at least one is positive (hypergeometric distribution).

        Raises:
            ValueError: ``k`` is not in 1..``num_scored``.
        """
        if not 1 <= k <= self.num_scored:
            raise ValueError(f"recall@{k}: expected 1 <= k <= {self.num_scored}, the number of scored items")
        draws = np.clip(k - self.above, 0, self.tied)
        missed = np.ones(len(draws))
        # C(t-p, j) / C(t, j) is symmetric in p and j: the shorter product is the cheaper one
        longer = np.maximum(draws, self.tied_positives)
        shorter = np.minimum(draws, self.tied_positives)
        for step in range(int(shorter.max(initial=0))):
            live = step < shorter
            missed[live] *= np.maximum(self.tied - longer - step, 0)[live] / (self.tied[live] - step)
        return np.asarray(1.0 - missed)

    def expected_rank(self) -> Floats:
        """Return each query's mean rank of its best positive, 1 for the first; (queries,).

        ``above + (tied + 1) / (tied_positives + 1)``: the mean of the smallest of p draws from 1..tied.

        Raises:
            ValueError: Only some items were scored, so that ranks beyond them do not exist.
        """
        if not self.has_ranks:
            raise ValueError("ranks beyond the reranked candidates do not exist; use recall at k <= k_test")
        return np.asarray(self.above + (self.tied + 1) / (self.tied_positives + 1))

    @property
    def has_ranks(self) -> bool:
        """Whether every item was scored, so that every positive has a rank."""
        return self.num_scored == self.num_items

    @property
    def is_tied(self) -> NDArray[np.bool_]:
        """Whether an item that is not a positive ties with the query's best positive; (queries,)."""
        return np.asarray(self.tied > self.tied_positives)


def rank_scores(
    scores: NDArray[Any],
    positives: Positives,
    *,
    rows: Ints | None = None,
    checked: bool = False,
    adjust: Adjustment | None = None,
) -> RankCounts:
    """Count, for each query, the items above and beside its positives.

    Works by blocks of rows promoted to fp32 (fp64 and wide integers to fp64): next to the matrix itself,
    which may be a memory map, it needs about 200 MB.

    Args:
        scores: (queries, items); float, integer, or bfloat16 as NumPy loads it (two-byte void).
        positives: The right items of each of the ``rows``.
        rows: Rows of ``scores`` that are queries, one for each entry of ``positives``; all by default.
        checked: The matrix is known to be finite (``check_finite`` has seen it).
        adjust: Makes the scores to rank from a promoted block (rows, items) and its row numbers, such as
            ``dual_softmax`` or ``bank_softmax``.

    Raises:
        ValueError: The shapes do not fit, the type is not a number, or a score is not finite.
    """
    check_matrix(scores)
    rows = np.arange(len(scores), dtype=np.int64) if rows is None else rows
    if len(rows) != len(positives) or scores.shape[1] != positives.num_items:
        raise ValueError(
            f"expected scores of {len(positives)} queries x {positives.num_items} items as in the positives, "
            f"got {len(rows)} x {scores.shape[1]}"
        )
    if not checked:
        check_finite(scores)
    best, pairs = np.zeros((3, len(rows)), np.int64), np.zeros((4, len(positives.items)), np.int64)
    for start, stop in row_blocks(len(rows), scores.shape[1]):
        block = promote(scores[rows[start:stop]])
        if adjust is not None:
            block = adjust(block, rows[start:stop])
        low, high = positives.offsets[start], positives.offsets[stop]
        _count_block(block, positives, start, best[:, start:stop], pairs[:, low:high])
    every = PairCounts(positives.queries, pairs[0], pairs[1], pairs[2], pairs[3])
    num_items = positives.num_items
    return RankCounts(
        best[0],
        best[1],
        best[2],
        num_items,
        num_items,
        ndcg(every, positives.sizes, num_items),
        average_precision(every, positives.sizes, num_items),
    )


def rank_candidates(candidates: Ints, scores: Floats, positives: Positives) -> RankCounts:
    """Count as ``rank_scores`` does when only some items of each query were scored (``itm@k``).

    A positive outside the candidates has no rank; it misses every recall at k up to the number of
    candidates, which is all that the result allows to ask.

    Args:
        candidates: (queries, k) item columns, distinct within a row.
        scores: (queries, k) their scores.
        positives: The right items of each query.

    Raises:
        ValueError: The shapes do not fit or a score is not finite.
    """
    if candidates.shape != scores.shape or len(candidates) != len(positives):
        raise ValueError(
            f"expected candidates and scores ({len(positives)}, k), got {candidates.shape} and {scores.shape}"
        )
    check_finite(scores)
    scores = promote(scores)
    key = np.arange(len(candidates), dtype=np.int64)[:, None] * positives.num_items + candidates
    right = np.isin(key, positives.queries * positives.num_items + positives.items)
    # a query whose positives are all outside stands below its last candidate
    best = np.where(right, scores, -np.inf).max(axis=1, initial=-np.inf)
    num_scored, num_items = candidates.shape[1], positives.num_items
    pairs = _candidate_pairs(scores, right)
    whole = num_scored == num_items
    return RankCounts(
        np.count_nonzero(scores > best[:, None], axis=1).astype(np.int64),
        np.count_nonzero(scores == best[:, None], axis=1).astype(np.int64),
        np.count_nonzero(right & (scores == best[:, None]), axis=1).astype(np.int64),
        num_scored,
        num_items,
        ndcg(pairs, positives.sizes, num_items) if whole or num_scored >= NDCG_DEPTH else None,
        average_precision(pairs, positives.sizes, num_items) if whole else None,
    )


def top_candidates(scores: NDArray[Any], k: int, *, seed: int = 0) -> tuple[Ints, int]:
    """Return the ``k`` best items of each query, and how many queries had a tie at the cut.

    Tied items at the cut are taken in an order drawn from ``seed`` for each query, never in gallery order:
    a collapsed first stage must not profit from where the right item happens to stand.

    Returns:
        (queries, min(k, items)) item columns, best first, and the number of queries cut within a tie.

    Raises:
        ValueError: ``k`` is below 1 or a score is not finite.
    """
    check_matrix(scores)
    if k < 1:
        raise ValueError(f"expected k >= 1 candidates, got {k}")
    check_finite(scores)
    num_items = scores.shape[1]
    k = min(k, num_items)
    result = np.empty((len(scores), k), np.int64)
    cut_ties = 0
    random = np.random.default_rng(seed)
    for start, stop in row_blocks(len(scores), num_items):
        block = promote(scores[start:stop])
        for row in range(stop - start):
            shuffle = random.permutation(num_items)
            order = shuffle[np.argsort(-block[row, shuffle], kind="stable")]
            result[start + row] = order[:k]
            cut_ties += k < num_items and bool(block[row, order[k - 1]] == block[row, order[k]])
    return result, cut_ties


def chance_counts(positives: Positives) -> RankCounts:
    """Return what a model without any knowledge reaches: every item ties with every other."""
    size = np.full(len(positives), positives.num_items, np.int64)
    num_items, none = positives.num_items, np.zeros(len(positives.items), np.int64)
    pairs = PairCounts(
        positives.queries, none, none + num_items, none, np.repeat(positives.sizes, positives.sizes)
    )
    return RankCounts(
        np.zeros_like(size),
        size,
        positives.sizes,
        num_items,
        num_items,
        ndcg(pairs, positives.sizes, num_items),
        average_precision(pairs, positives.sizes, num_items),
    )


def _count_block(block: Floats, positives: Positives, start: int, best: Ints, pairs: Ints) -> None:
    """Fill ``best`` (3, rows): above, tied, tied positives, and ``pairs`` (4, pairs) as in ``PairCounts``."""
    offsets = positives.offsets[start : start + len(block) + 1] - positives.offsets[start]
    sizes = np.diff(offsets)
    items = positives.items[positives.offsets[start] :][: offsets[-1]]
    owners = np.repeat(np.arange(len(block), dtype=np.int64), sizes)
    right = block[owners, items]
    highest = np.maximum.reduceat(right, offsets[:-1])
    best[0] = np.count_nonzero(block > highest[:, None], axis=1)
    best[1] = np.count_nonzero(block == highest[:, None], axis=1)
    best[2] = np.bincount(owners[right == highest[owners]], minlength=len(block))
    pairs[0], pairs[1], pairs[2], pairs[3] = best[0][owners], best[1][owners], 0, best[2][owners]
    for row in np.flatnonzero(sizes > 1):
        own = slice(offsets[row], offsets[row + 1])
        values = right[own]
        if values.min() < highest[row]:
            pairs[0, own], pairs[1, own] = _above_and_tied(block[row], values)
            pairs[2, own], pairs[3, own] = _above_and_tied(values, values)


def _above_and_tied(scores: Floats, values: Floats) -> tuple[Ints, Ints]:
    """Return how many scores are above, and how many equal, each of the values."""
    if len(values) <= _MOST_COMPARED:
        above = np.count_nonzero(scores > values[:, None], axis=1)
        return above, np.count_nonzero(scores == values[:, None], axis=1)
    ascending = np.sort(scores)
    last = np.searchsorted(ascending, values, side="right")
    return len(scores) - last, last - np.searchsorted(ascending, values, side="left")


def _candidate_pairs(scores: Floats, right: NDArray[np.bool_]) -> PairCounts:
    owners, columns = np.nonzero(right)
    values = scores[owners, columns][:, None]
    above, tied = scores[owners] > values, scores[owners] == values
    hits = right[owners]
    counts = (np.count_nonzero(mask, axis=1) for mask in (above, tied, above & hits, tied & hits))
    return PairCounts(owners, *counts)
