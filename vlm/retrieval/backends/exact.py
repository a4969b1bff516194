"""Exact search in NumPy: the definition of what every backend must return.

The score of a vector is the inner product of its stored float16 numbers with the float32 query, summed in
float64 and rounded to float32; equal scores rank by row. Summing so makes a score independent of how many
vectors are looked at together, which a matrix product does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

_BLOCK_ROWS = 16384
# PyTorch shares work between threads from this many numbers on
_PIECE = 32_768
# bound on the rounding of a float32 inner product, a term; see `tolerance`
_ROUNDING_PER_TERM = 1.2e-7


class Gatherable(Protocol):
    """Vectors that can be had by row."""

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return float16 (len(rows), dim)."""


class VectorSource(Gatherable, Protocol):
    """Vectors by row.

    Attributes:
        num_rows: How many.
        dim: Their length.
        key: Changes whenever the vectors do.
    """

    num_rows: int
    dim: int
    key: str

    def prefix_key(self, num_rows: int) -> str | None:
        """Return the key that the first rows alone would have; None where they end within a part."""

    def blocks(self, max_rows: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float16 (at most max_rows, dim)) over the rows from `first` on, in order.

        `first` is 0 or one of the numbers of rows that `prefix_key` knows.
        """


class Backend(Protocol):
    """What a search structure offers.

    Attributes:
        name: ``exact``, ``faiss`` or ``lance``.
        shares_passes: Whether several queries together cost much less than one after another.
    """

    name: str

    @property
    def shares_passes(self) -> bool:
        """See above."""

    def search(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows of each query.

        Args:
            queries: (queries, dim) float32.
            top_k: How many rows to return at most.
            allowed: (rows,) bool, which rows may be returned; all if None.

        Returns:
            Scores (queries, top_k) float32, descending, and rows (queries, top_k) int64; where fewer rows are
            allowed, the rest is -inf and -1.
        """


class ExactBackend:
    """Looks at every vector.

    Args:
        vectors: What is searched.
        product: Returns inner products (queries, rows) of queries and vectors, rounded as float32 is; NumPy's
            if None. It only proposes: scores are by definition.
    """

    name = "exact"
    shares_passes = True

    def __init__(
        self, vectors: VectorSource, product: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    ) -> None:
        self._vectors, self._product = vectors, product or (lambda queries, values: queries @ values.T)
        self._largest_norms: dict[int, float] = {}

    def search(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows of each query; see `Backend.search`."""
        queries = check_queries(queries, self._vectors.dim, top_k)
        candidates: list[list[np.ndarray]] = [[] for _ in queries]
        for first, block in self._vectors.blocks(_BLOCK_ROWS):
            rows = np.arange(first, first + len(block))
            if allowed is not None:
                keep = allowed[first : first + len(block)]
                rows, block = rows[keep], block[keep]
            if not len(rows):
                continue
            values = widened(block)
            slack = tolerance(queries, self._largest_norm(first, values, allowed is None))
            scores = self._product(queries, values)
            for query, line in enumerate(scores):
                candidates[query].append(rows[_near_best(line, top_k, slack[query])])
        return settle(self._vectors, queries, candidates, top_k)

    def _largest_norm(self, first: int, values: np.ndarray, is_whole: bool) -> float:
        """Return the norm of a block's longest vector; remembered if the block is not filtered."""
        known = self._largest_norms.get(first)
        if known is None:
            known = float(np.linalg.norm(values, axis=1).max())
            if is_whole:
                self._largest_norms[first] = known
        return known


def search_rows(
    vectors: VectorSource, queries: np.ndarray, rows: np.ndarray, top_k: int, largest_norm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of some rows for each query; see `Backend.search`.

    Args:
        vectors: What is searched.
        queries: As `check_queries` returns them.
        rows: (rows,) ascending; only these are read.
        top_k: How many to return at most.
        largest_norm: Bound on the norm of these vectors.
    """
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in queries]
    slack = tolerance(queries, largest_norm)
    for first in range(0, len(rows), _BLOCK_ROWS):
        part = rows[first : first + _BLOCK_ROWS]
        values = widened(vectors.gather(part))
        # no matrix product for one query: its threads would be waited for, on a busy machine for long
        scores = np.einsum("rd,d->r", values, queries[0])[None] if len(queries) == 1 else queries @ values.T
        for query, line in enumerate(scores):
            near = _near_best(line, top_k, slack[query])
            found[query].append((_defined(values[near], queries[query]), part[near]))
    return _ranked(found, top_k)


def check_queries(queries: np.ndarray, dim: int, top_k: int) -> np.ndarray:
    """Return the queries as contiguous float32 (queries, dim).

    Raises:
        ValueError: The shape is another, a number is not finite, or `top_k` is below 1.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries must have shape (queries, {dim}), got {queries.shape}")
    if not np.isfinite(queries).all():
        raise ValueError("queries must be finite")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return queries


def tolerance(queries: np.ndarray, largest_norm: float) -> np.ndarray:
    """Return how far a float32 score may be off, for each query, so that no candidate is lost to rounding."""
    bound: np.ndarray = np.linalg.norm(queries, axis=1) * largest_norm * queries.shape[1] * _ROUNDING_PER_TERM
    return bound


def settle(
    vectors: Gatherable, queries: np.ndarray, candidates: list[list[np.ndarray]], top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score candidate rows by the definition and keep the best; see `Backend.search`."""
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in queries]
    for query, parts in enumerate(candidates):
        if parts:
            rows = np.unique(np.concatenate(parts))
            found[query].append((exact_scores(vectors, queries[query], rows), rows))
    return _ranked(found, top_k)


def _ranked(found: list[list[tuple[np.ndarray, np.ndarray]]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of scores and rows that were found part by part for each query."""
    all_scores = np.full((len(found), top_k), -np.inf, np.float32)
    all_rows = np.full((len(found), top_k), -1, np.int64)
    for query, parts in enumerate(found):
        if not parts:
            continue
        scores, rows = (np.concatenate(both) for both in zip(*parts, strict=True))
        order = np.lexsort((rows, -scores))[:top_k]
        all_scores[query, : len(order)] = scores[order]
        all_rows[query, : len(order)] = rows[order]
    return all_scores, all_rows


def exact_scores(vectors: Gatherable, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the defined scores (rows,) float32 of some rows."""
    scores = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), _BLOCK_ROWS):
        part = rows[first : first + _BLOCK_ROWS]
        scores[first : first + len(part)] = _defined(widened(vectors.gather(part)), query)
    return scores


def widened(vectors: np.ndarray) -> np.ndarray:
    """Return float16 (rows, dim) as float32, which holds them exactly."""
    if not vectors.flags.writeable:  # mapped from a file; PyTorch takes no array that it must not write
        return vectors.astype(np.float32)
    import torch

    # NumPy turns one number after another, PyTorch many at once; so few that it calls no threads of its own:
    # where PyTorch has MKL, to forbid them here would also change what another thread computes meanwhile
    wide = torch.empty(vectors.shape, dtype=torch.float32)
    stored, rows = torch.from_numpy(vectors), max(1, _PIECE // max(1, vectors.shape[1]))
    for first in range(0, len(vectors), rows):
        wide[first : first + rows].copy_(stored[first : first + rows])
    numbers: np.ndarray = wide.numpy()
    return numbers


def _defined(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the scores (rows,) float32 that vectors have by definition."""
    products = vectors.astype(np.float64) * query.astype(np.float64)
    scores: np.ndarray = products.sum(axis=1).astype(np.float32)
    return scores


def _near_best(scores: np.ndarray, top_k: int, slack: float) -> np.ndarray:
    """Return the positions of the best `top_k` scores, and of those that rounding may have kept from it."""
    if len(scores) <= top_k:
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
    return np.flatnonzero(scores >= threshold - 2 * slack)
