"""Measures that look at every positive, not at the best alone: nDCG and average precision, ties averaged.

A positive within a group of tied items stands on each of the group's places equally often, so that the
expectation over all tie orders is a difference of two prefix sums.

Source: McSherry and Najork 2008, Computing information retrieval performance measures efficiently in the
presence of tied scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm.metrics.matrices import Floats, Ints

NDCG_DEPTH = 10


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Where every positive stands; all arrays are (pairs,) int64.

    Attributes:
        owners: The query of each.
        above: Items that score higher.
        tied: Items that score exactly as much, itself included.
        positives_above: The query's positives among ``above``.
        positives_tied: The query's positives among ``tied``, itself included.
    """

    owners: Ints
    above: Ints
    tied: Ints
    positives_above: Ints
    positives_tied: Ints


def ndcg(pairs: PairCounts, sizes: Ints, num_items: int) -> Floats:
    """Return each query's expected nDCG@10 with gains of one; (queries,).

    ``sum over positives with rank r <= 10 of 1 / log2(r + 1)``, over that sum of a perfect order.

    Args:
        pairs: The positives that were scored; another one is taken to stand below the tenth place.
        sizes: Number of positives of each query; (queries,).
        num_items: The gallery's size.
    """
    places = np.arange(1, num_items + 1)
    discounts = _sums_before(np.where(places <= NDCG_DEPTH, 1.0 / np.log2(places + 1.0), 0.0))
    gains = (discounts[pairs.above + pairs.tied] - discounts[pairs.above]) / pairs.tied
    ideal = discounts[np.minimum(sizes, NDCG_DEPTH)]
    return np.minimum(np.bincount(pairs.owners, weights=gains, minlength=len(sizes)) / ideal, 1.0)


def average_precision(pairs: PairCounts, sizes: Ints, num_items: int) -> Floats:
    """Return each query's expected average precision; (queries,).

    ``mean over positives of (positives up to its rank) / rank``.

    Args:
        pairs: Every positive of every query.
        sizes: Number of positives of each query; (queries,).
        num_items: The gallery's size.
    """
    harmonic = _sums_before(1.0 / np.arange(1, num_items + 1))
    above, tied = pairs.above, pairs.tied
    # on place j of its group: (A + 1 + (j - 1) s) / (a + j), with s the share of positives among the others
    others = (pairs.positives_tied - 1) / np.maximum(tied - 1, 1)
    span = harmonic[above + tied] - harmonic[above]
    spread = ((pairs.positives_above + 1) * span + others * (tied - (above + 1) * span)) / tied
    alone = (pairs.positives_above + 1) / (above + 1)
    precision = np.bincount(pairs.owners, weights=np.where(tied == 1, alone, spread), minlength=len(sizes))
    return np.minimum(precision / sizes, 1.0)


def _sums_before(values: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])
