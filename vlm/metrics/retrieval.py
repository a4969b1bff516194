"""Ranks of the right items in a score matrix, as expected values under uniformly random tie order.

A sort gives tied items some order, and that order decides the published number: a model that gives every
item the same score reaches anything between 0 and 100 % by the rule of its sort. Here nothing is sorted:
a query's outcome is three counts (items above its best positive, items tied with it, positives among
those), and every measure is the exact mean over all orders of the tied items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Positives:
    """Which items are right for each query, as one flat list cut by offsets.

    Attributes:
        items: Item columns, ascending within each query, without repeats; (pairs,) int64.
        offsets: Query i owns ``items[offsets[i]:offsets[i + 1]]``; (queries + 1,) int64.
        num_items: Size of the gallery.
    """

    items: Ints
    offsets: Ints
    num_items: int

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]], num_items: int) -> Positives:
        """Build from one list of item columns a query; a repeated column counts once.

        Raises:
            ValueError: There is no query, a list is empty, or a column is not an integer in
                ``[0, num_items)``.
        """
        if not len(lists):
            raise ValueError("positives: expected a list of item columns for each query, got no query")
        rows = []
        for query, columns in enumerate(lists):
            row = np.asarray(columns)
            if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
                raise ValueError(
                    f"positives of query {query}: expected a non-empty list of item columns, got {columns!r}"
                )
            row = np.unique(row.astype(np.int64))
            if row[0] < 0 or row[-1] >= num_items:
                wrong = int(row[0] if row[0] < 0 else row[-1])
                raise ValueError(
                    f"positives of query {query}: item column {wrong} is outside 0..{num_items - 1}"
                )
            rows.append(row)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows), offsets, num_items)

    @classmethod
    def from_matrix(cls, truth: ArrayLike) -> Positives:
        """Build from a boolean (queries, items) matrix.

        Raises:
            ValueError: It is not a boolean matrix, or a query has no positive.
        """
        matrix = np.asarray(truth)
        if matrix.ndim != 2 or matrix.dtype != np.bool_:
            raise ValueError(
                f"truth: expected a boolean (queries, items) matrix, got {matrix.dtype} {matrix.shape}"
            )
        counts = matrix.sum(axis=1)
        if not matrix.size or not counts.all():
            empty = int(np.argmin(counts)) if matrix.size else 0
            raise ValueError(f"positives of query {empty}: expected a non-empty list of item columns, got []")
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(np.nonzero(matrix)[1].astype(np.int64), offsets, matrix.shape[1])

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.offsets) - 1

    def __getitem__(self, query: int) -> Ints:
        """Return the item columns of one query."""
        return self.items[self.offsets[query] : self.offsets[query + 1]]

    @property
    def sizes(self) -> Ints:
        """Number of positives of each query."""
        return np.diff(self.offsets)

    @property
    def queries(self) -> Ints:
        """The query of each entry of ``items``."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def reversed(self) -> tuple[Positives, Ints]:
        """Return the other direction, and the items that it is defined for.

        Items that are right for no query (distractors) cannot be queries themselves and are left out:
        row i of the result belongs to item ``kept[i]``.
        """
        order = np.lexsort((self.queries, self.items))
        kept, counts = np.unique(self.items, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Positives(self.queries[order], offsets, len(self)), kept


@dataclass(frozen=True, slots=True)
class RankCounts:
    """Where the best positive of each query stands; all arrays are (queries,) int64.

    Attributes:
        above: Items that score higher than the query's best positive.
        tied: Items that score exactly as much, the positives themselves included; at least 1, or 0 if no
            positive was scored at all (a positive outside the reranked candidates).
        tied_positives: Positives among the tied.
        num_scored: How deep the ranks are valid: the gallery's size, or k of ``itm@k``.
        num_items: The gallery's size.
    """

    above: Ints
    tied: Ints
    tied_positives: Ints
    num_scored: int
    num_items: int

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
    scores: NDArray[Any], positives: Positives, *, rows: Ints | None = None, checked: bool = False
) -> RankCounts:
    """Count, for each query, the items above and beside its best positive.

    Works by blocks of rows promoted to fp32 (fp64 and wide integers to fp64): next to the matrix itself,
    which may be a memory map, it needs about 200 MB.

    Args:
        scores: (queries, items); float, integer, or bfloat16 as NumPy loads it (two-byte void).
        positives: The right items of each of the ``rows``.
        rows: Rows of ``scores`` that are queries, one for each entry of ``positives``; all by default.
        checked: The matrix is known to be finite (``check_finite`` has seen it).

    Raises:
        ValueError: The shapes do not fit, the type is not a number, or a score is not finite.
    """
    _check_matrix(scores)
    rows = np.arange(len(scores), dtype=np.int64) if rows is None else rows
    if len(rows) != len(positives) or scores.shape[1] != positives.num_items:
        raise ValueError(
            f"expected scores of {len(positives)} queries x {positives.num_items} items as in the positives, "
            f"got {len(rows)} x {scores.shape[1]}"
        )
    if not checked:
        check_finite(scores)
    above, tied, tied_positives = (np.zeros(len(rows), np.int64) for _ in range(3))
    for start, stop in _blocks(len(rows), scores.shape[1]):
        block = promote(scores[rows[start:stop]])
        low, high = positives.offsets[start], positives.offsets[stop]
        owners = _owners(positives, start, stop)
        right = block[owners, positives.items[low:high]]
        best = np.maximum.reduceat(right, positives.offsets[start:stop] - low)
        above[start:stop] = np.count_nonzero(block > best[:, None], axis=1)
        tied[start:stop] = np.count_nonzero(block == best[:, None], axis=1)
        tied_positives[start:stop] = np.bincount(owners[right == best[owners]], minlength=stop - start)
    return RankCounts(above, tied, tied_positives, scores.shape[1], scores.shape[1])


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
    return RankCounts(
        np.count_nonzero(scores > best[:, None], axis=1).astype(np.int64),
        np.count_nonzero(scores == best[:, None], axis=1).astype(np.int64),
        np.count_nonzero(right & (scores == best[:, None]), axis=1).astype(np.int64),
        candidates.shape[1],
        positives.num_items,
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
    _check_matrix(scores)
    if k < 1:
        raise ValueError(f"expected k >= 1 candidates, got {k}")
    check_finite(scores)
    num_items = scores.shape[1]
    k = min(k, num_items)
    result = np.empty((len(scores), k), np.int64)
    cut_ties = 0
    random = np.random.default_rng(seed)
    for start, stop in _blocks(len(scores), num_items):
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
    num_items = positives.num_items
    return RankCounts(np.zeros_like(size), size, positives.sizes, num_items, num_items)


def check_finite(scores: NDArray[Any]) -> None:
    """Refuse a matrix that holds a NaN or an infinity.

    Sorting puts NaN first or drops it, by library, and turns a broken model into a good one.

    Raises:
        ValueError: Says how many scores are not finite and where the first one is.
    """
    if scores.dtype.kind in "iu":
        return
    count, first = 0, (0, 0)
    for start, stop in _blocks(len(scores), max(1, int(np.prod(scores.shape[1:])))):
        wrong = ~np.isfinite(promote(scores[start:stop]))
        found = int(np.count_nonzero(wrong))
        if found and not count:
            row, *rest = (int(i) for i in np.argwhere(wrong)[0])
            first = (start + row, rest[0] if rest else 0)
        count += found
    if count:
        raise ValueError(
            f"{count} of {scores.size} scores are not finite, the first at (query, item) = {first}; "
            "find the model or the clip that makes them: a rank among them means nothing"
        )


def promote(scores: NDArray[Any]) -> Floats:
    """Return scores as fp32; fp64 and integers wider than two bytes become fp64, so no order is lost.

    Raises:
        ValueError: The type is not a real number.
    """
    dtype = scores.dtype
    if dtype.name == "bfloat16":
        return np.asarray(scores.astype(np.float32))
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        # NumPy saves bfloat16 as two nameless bytes: the upper half of an fp32
        bits = np.ascontiguousarray(scores).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return np.asarray(bits.view(np.float32))
    if dtype.kind not in "fiu":
        raise ValueError(f"expected real scores (float, integer or bfloat16), got {dtype}")
    wide = dtype.itemsize > (4 if dtype.kind == "f" else 2)
    return scores.astype(np.float64 if wide else np.float32, copy=False)


def _check_matrix(scores: NDArray[Any]) -> None:
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"expected a non-empty (queries, items) score matrix, got shape {scores.shape}")


def _owners(positives: Positives, start: int, stop: int) -> Ints:
    return np.repeat(np.arange(stop - start, dtype=np.int64), np.diff(positives.offsets[start : stop + 1]))


def _blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    size = max(1, _BLOCK_BYTES // (8 * num_columns))
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)
