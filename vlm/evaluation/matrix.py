"""A card from a score matrix that somebody else computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vlm.config import to_dict
from vlm.errors import UsageError
from vlm.evaluation.card import FORMAT, Card, file_sha256, sections
from vlm.evaluation.dataset import read_scores
from vlm.evaluation.outcomes import matrix_outcomes
from vlm.evaluation.protocol import BootstrapSettings

_FULL_KINDS = ("itc", "dsl", "bank")


def evaluate_scores(
    scores: Path,
    positives: Path,
    *,
    kind: str = "itc",
    recall_at: tuple[int, ...] = (1, 5, 10, 50),
    bootstrap: BootstrapSettings | None = None,
) -> Card:
    """Make a card from a score matrix and its positives.

    Args:
        scores: ``.npy`` file of (queries, items); float, integer or bfloat16.
        positives: JSON file: for each query a list of item columns.
        kind: ``itc``, ``dsl``, ``bank``, or ``itm@k``: then only R@k up to k is read, and only for queries,
            since a reranked matrix holds fill values elsewhere and is not symmetric.
        recall_at: The k of R@k; those beyond the gallery are left out.
        bootstrap: How intervals are drawn.

    Raises:
        InvalidInput: A file cannot be used or a score is not finite.
        UsageError: The kind is not known.
    """
    bootstrap = bootstrap or BootstrapSettings()
    depth = _rerank_depth(kind)
    matrix, right = read_scores(scores, positives)
    outcomes = matrix_outcomes(matrix, right, kind)
    if depth is not None:
        counts, groups = outcomes.ranks["query_to_item"][kind]
        inside = counts.above < depth
        outcomes.ranks = {}
        shown = dataclasses.replace(
            counts,
            tied=np.where(inside, counts.tied, 0),
            tied_positives=np.where(inside, counts.tied_positives, 0),
            num_scored=min(depth, counts.num_scored),
        )
        outcomes.add("query_to_item", kind, shown, groups)
    protocol = {
        "name": "scores",
        "version": 1,
        "recall_at": list(recall_at),
        "bootstrap": to_dict(bootstrap),
        "positives_sha256": file_sha256(positives),
        "num_queries": len(right),
        "num_items": right.num_items,
    }
    model = {"name": scores.name, "scores_sha256": file_sha256(scores), "dtype": str(matrix.dtype)}
    return {
        "format": FORMAT,
        "protocol": protocol,
        "model": model,
        "results": outcomes.results(recall_at, bootstrap),
        "ties": outcomes.ties(),
        "chance": sections.chance(right, recall_at),
        "environment": sections.environment("cpu", 1),
        "per_query": outcomes.per_query(),
    }


def _rerank_depth(kind: str) -> int | None:
    """Return k of ``itm@k``, None for a kind that scores every pair.

    Raises:
        UsageError: The kind is not known.
    """
    if kind in _FULL_KINDS:
        return None
    name, _, depth = kind.partition("@")
    if name == "itm" and depth.isdecimal() and int(depth) >= 1:
        return int(depth)
    raise UsageError(f"expected a kind of score among {', '.join(_FULL_KINDS)}, itm@K, got {kind!r}")
