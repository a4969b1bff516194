"""A card from a score matrix that somebody else computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.config import to_dict
from vlm.errors import InvalidInput, UsageError
from vlm.evaluation.card import FORMAT, Card, file_sha256, sections
from vlm.evaluation.card.inspection import inspect_scores, recall_curves
from vlm.evaluation.outcomes import Outcomes, matrix_outcomes, shared_positives
from vlm.evaluation.protocol import BootstrapSettings
from vlm.evaluation.scores.corrections import DEFAULT_SCALE, Corrections, add_corrections
from vlm.evaluation.scores.files import read_positives, read_scores, read_texts
from vlm.metrics import Positives, RankCounts, check_finite, rank_scores
from vlm.metrics.gains import NDCG_DEPTH
from vlm.metrics.matrices import promote, row_blocks

_FULL_KINDS = ("itc", "dsl", "bank")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixFiles:
    """What is known about a matrix beside its scores and positives.

    Attributes:
        kind: ``itc``, ``dsl``, ``bank``, or ``itm@k``, ``itm+itc@k``: then only R@k up to k is read, and only
            for queries, since a reranked matrix holds fill values elsewhere and is not symmetric.
        captions: The queries' texts, a JSON list or one a line: equal ones are reported sharing positives.
        dual_softmax: Report the dual softmax of these ``itc`` scores too.
        bank: Scores (bank queries, items) of queries not under test: report the bank's correction too.
        scale: What scores are multiplied by within both corrections.
    """

    kind: str = "itc"
    captions: Path | None = None
    dual_softmax: bool = False
    bank: Path | None = None
    scale: float = DEFAULT_SCALE


def evaluate_scores(
    scores: Path,
    positives: Path,
    files: MatrixFiles | None = None,
    *,
    recall_at: tuple[int, ...] = (1, 5, 10, 50),
    bootstrap: BootstrapSettings | None = None,
) -> Card:
    """Make a card from a score matrix and its positives.

    Args:
        scores: ``.npy`` or ``.safetensors`` file of (queries, items); float, integer or bfloat16.
        positives: JSON file: for each query a list of item columns.
        files: The kind of score, and what else is reported.
        recall_at: The k of R@k; those beyond the gallery are left out.
        bootstrap: How intervals are drawn.

    Raises:
        InvalidInput: A file cannot be used, a score is not finite, or more than k items are scored.
        UsageError: The kind is not known, or corrections are asked for of anything but ``itc``.
    """
    files, bootstrap = files or MatrixFiles(), bootstrap or BootstrapSettings()
    _rerank_depth(files.kind)  # an unknown kind is refused before any file is read
    if files.kind != "itc" and (files.dual_softmax or files.bank or files.captions):
        raise UsageError(f"captions, dual softmax and bank go with itc scores, not with {files.kind}")
    matrix = read_scores(scores)
    right = read_positives(positives, matrix)
    captions = _captions(files.captions, len(right))
    labels = _labels(captions)
    outcomes, shown = _ranked(matrix, right, files.kind, captions, labels)
    bank = None if files.bank is None else read_scores(files.bank)
    corrections = Corrections(dual_softmax=files.dual_softmax, bank=bank, scale=files.scale)
    kinds = add_corrections(outcomes, matrix, right, corrections)
    protocol = {
        "name": "scores",
        "version": 1,
        "recall_at": list(recall_at),
        "bootstrap": to_dict(bootstrap),
        "positives_sha256": file_sha256(positives),
        "num_queries": len(right),
        "num_items": right.num_items,
    }
    model = {"name": scores.name, "scores_sha256": file_sha256(scores), "dtype": _type_name(matrix)}
    return {
        "format": FORMAT,
        "protocol": protocol,
        "model": model,
        "results": outcomes.results(recall_at, bootstrap),
        "kinds": kinds,
        "duplicates": sections.duplicates(right, labels, outcomes, recall_at, bootstrap) if labels else {},
        "ties": outcomes.ties(),
        "chance": sections.chance(right, recall_at),
        "recall_curve": recall_curves(outcomes),
        **shown,
        "environment": sections.environment("cpu", 1),
        "per_query": outcomes.per_query(),
    }


def _ranked(
    matrix: NDArray[Any], right: Positives, kind: str, captions: list[str], labels: list[str]
) -> tuple[Outcomes, dict[str, Any]]:
    """Rank a matrix, and return what else can be shown of it; nothing of one with fill values."""
    depth = _rerank_depth(kind)
    if depth is not None and depth < right.num_items:
        return _reranked(matrix, right, kind, depth), {}
    shared = shared_positives(right, labels) if labels else None
    outcomes = matrix_outcomes(matrix, right, kind, shared=shared)
    if depth is not None:
        del outcomes.ranks["item_to_query"]
    return outcomes, inspect_scores(outcomes, kind, matrix, right, queries=captions)


def _reranked(matrix: NDArray[Any], right: Positives, kind: str, depth: int) -> Outcomes:
    """Rank a matrix in which each row holds at most ``depth`` scores and one fill value below them."""
    try:
        check_finite(matrix)
        num_scored = _scored_per_row(matrix, kind, depth)
        counts = rank_scores(matrix, right, checked=True)
    except ValueError as error:
        raise InvalidInput(f"{kind} scores: {error}") from error
    inside = counts.above + counts.tied <= num_scored
    whole = depth >= NDCG_DEPTH and bool((num_scored == depth).all())
    shown = RankCounts(
        np.where(inside, counts.above, depth),
        np.where(inside, counts.tied, 0),
        np.where(inside, counts.tied_positives, 0),
        depth,
        right.num_items,
        # fill values of a row with fewer scores would stand among its first ten
        counts.ndcg if whole else None,
    )
    outcomes = Outcomes()
    outcomes.add("query_to_item", kind, shown, right.items[right.offsets[:-1]])
    return outcomes


def _scored_per_row(matrix: NDArray[Any], kind: str, depth: int) -> NDArray[np.int64]:
    counts = np.zeros(len(matrix), np.int64)
    for start, stop in row_blocks(*matrix.shape):
        block = promote(matrix[start:stop])
        counts[start:stop] = np.count_nonzero(block > block.min(axis=1, keepdims=True), axis=1)
    if counts.max() > depth:
        row = int(np.argmax(counts > depth))
        raise ValueError(
            f"row {row} holds {counts[row]} scores above its lowest, but {kind} scores {depth} items a "
            "query; all others must hold one fill value below them"
        )
    return counts


def _captions(path: Path | None, num_queries: int) -> list[str]:
    if path is None:
        return []
    texts = read_texts(path)
    if len(texts) != num_queries:
        raise InvalidInput(f"{path}: expected {num_queries} captions, one a query, got {len(texts)}")
    return texts


def _labels(captions: list[str]) -> list[str]:
    if not captions:
        return []
    from vlm.text import clean  # brings torch, which a score matrix alone does not need

    return [clean(text) for text in captions]


def _type_name(matrix: NDArray[Any]) -> str:
    return "bfloat16" if matrix.dtype == np.dtype("V2") else str(matrix.dtype)


def _rerank_depth(kind: str) -> int | None:
    """Return k of ``itm@k`` and the like, None for a kind that scores every pair.

    Raises:
        UsageError: The kind is not known.
    """
    if kind in _FULL_KINDS:
        return None
    name, _, depth = kind.partition("@")
    if name in ("itm", "itm+itc") and depth.isdecimal() and int(depth) >= 1:
        return int(depth)
    raise UsageError(
        f"expected a kind of score among {', '.join(_FULL_KINDS)}, itm@K, itm+itc@K, got {kind!r}"
    )
