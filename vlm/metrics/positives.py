"""Which items are right for which query."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics.matrices import Ints


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


def merge_duplicates(positives: Positives, labels: Sequence[Hashable]) -> Positives:
    """Return the positives with equal queries sharing theirs: what is right for one is right for all.

    Two queries with the same words and different items cannot both come first by strict one-to-one rules.

    Args:
        positives: The strict positives.
        labels: What makes queries equal, such as their cleaned texts; (queries,).

    Raises:
        ValueError: There is not one label a query.
    """
    if len(labels) != len(positives):
        raise ValueError(f"expected {len(positives)} labels, one a query, got {len(labels)}")
    groups = _numbered(labels)
    keys = np.unique(groups[positives.queries] * positives.num_items + positives.items)
    owners, items = np.divmod(keys, positives.num_items)
    starts = np.searchsorted(owners, np.arange(groups.max() + 2))
    sizes = np.diff(starts)[groups]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return Positives(items[np.repeat(starts[groups], sizes) + within], offsets, positives.num_items)


def strict_ceiling(positives: Positives, labels: Sequence[Hashable]) -> float:
    """Return the highest R@1 of whoever gives equal queries equal scores, by the strict positives.

    Args:
        positives: The strict positives.
        labels: What makes queries equal; (queries,).
    """
    keys = _numbered(labels)[positives.queries] * positives.num_items + positives.items
    served, counts = np.unique(keys, return_counts=True)
    best = np.zeros(len(positives), np.int64)
    np.maximum.at(best, served // positives.num_items, counts)
    return float(best.sum() / len(positives))


def demand_share(positives: Positives) -> float:
    """Return how much of the gallery the queries want, in (0, 1]; 1 if every item is wanted alike.

    The exponential of the entropy of what is wanted, over the gallery's size: 200 queries for 40 items of
    1,000, each as often as the others, give 0.04.
    """
    weights = np.repeat(1.0 / positives.sizes, positives.sizes)
    wanted = np.bincount(positives.items, weights=weights)
    shares = wanted[wanted > 0] / len(positives)
    return float(np.exp(-np.sum(shares * np.log(shares))) / positives.num_items)


def _numbered(labels: Sequence[Hashable]) -> Ints:
    number: dict[Hashable, int] = {}
    return np.asarray([number.setdefault(label, len(number)) for label in labels], np.int64)
