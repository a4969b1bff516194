"""Scores corrected for items that are near to every query (hubs), by other queries.

``dual_softmax`` takes the other test queries for it: it answers all of them at once or none, gains nothing
for a single query, and loses where some items are wanted more often than others. ``bank_softmax`` takes
queries that are not under test, and treats each test query by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.metrics.matrices import Floats, Ints, check_finite, check_matrix, promote, row_blocks
from vlm.metrics.retrieval import Adjustment


def dual_softmax(scores: NDArray[Any], scale: float) -> Adjustment:
    """Return the adjustment ``s * softmax over all queries of (scale * s)``, in fp64.

    Args:
        scores: (queries, items), all that are under test; transpose for the other direction.
        scale: What scores are multiplied by within the softmax (the inverse of a temperature).

    Raises:
        ValueError: A score is not finite, or the scale is not positive.

    Source: Cheng et al. 2021, Improving video-text retrieval by multi-stream corpus alignment and dual
    softmax loss, section 3.3.
    """
    sums = _log_sums(scores, scale)

    def adjust(block: Floats, _rows: Ints) -> Floats:
        wide = block.astype(np.float64)
        return np.asarray(wide * np.exp(scale * wide - sums))

    return adjust


def bank_softmax(bank: NDArray[Any], scale: float) -> Adjustment:
    """Return the adjustment by a bank of queries that are not under test, for one query or many.

    ``scale * s - log(sum over the bank of exp(scale * s_bank))`` for each item, which orders as the inverted
    softmax does. Only queries whose best item is the best of some bank query are corrected: of the others
    the bank knows nothing.

    Args:
        bank: (bank queries, items) scores by the same model.
        scale: What scores are multiplied by within the softmax (the inverse of a temperature).

    Raises:
        ValueError: A score is not finite, or the scale is not positive.

    Source: Bogolin et al. 2022, Cross modal retrieval with querybank normalisation, section 3.3.
    """
    sums = _log_sums(bank, scale)
    known = np.zeros(bank.shape[1], bool)
    for start, stop in row_blocks(*bank.shape):
        block = promote(bank[start:stop])
        known |= (block == block.max(axis=1, keepdims=True)).any(axis=0)

    def adjust(block: Floats, _rows: Ints) -> Floats:
        if block.shape[1] != len(sums):
            raise ValueError(f"expected a bank over {block.shape[1]} items, got {len(sums)}")
        wide = block.astype(np.float64)
        best = wide == wide.max(axis=1, keepdims=True)
        concerned = (best & known).any(axis=1)
        return np.where(concerned[:, None], scale * wide - sums, wide)

    return adjust


def _log_sums(scores: NDArray[Any], scale: float) -> Floats:
    """Return ``log(sum over rows of exp(scale * score))`` for each column."""
    if not 0 < scale < np.inf:
        raise ValueError(f"expected a positive scale of the softmax, got {scale}")
    check_matrix(scores)
    check_finite(scores)
    peaks, totals = np.full(scores.shape[1], -np.inf), np.zeros(scores.shape[1])
    for start, stop in row_blocks(*scores.shape):
        block = scale * promote(scores[start:stop]).astype(np.float64)
        higher = np.maximum(peaks, block.max(axis=0))
        totals = totals * np.exp(peaks - higher) + np.exp(block - higher).sum(axis=0)
        peaks = higher
    return np.asarray(peaks + np.log(totals))
