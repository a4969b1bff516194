"""How far an approximate structure must look: measured against exact search, on two kinds of queries.

Stored vectors alone would flatter it: texts lie elsewhere than what is stored, and need a wider search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm.retrieval.backends.exact import Backend, VectorSource
from vlm.retrieval.backends.plan import Plan, settings_of

TOP_K = 10
# What is promised is 0.95, and the sample is small. At worst a text finds all ten or none: then 0.99 of some
# 150 texts' best say at 99 % confidence that 0.95 of such texts' are found (Clopper and Pearson's bound).
TARGET_RECALL = 0.99
NUM_STORED = 100

Search = Callable[[np.ndarray, int, Plan], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """The share of the truly best ten that were found, over some queries.

    Attributes:
        queries: ``stored`` (vectors of the index, each without itself) or ``texts``.
        num_queries: How many.
        recall_at_10: Their mean.
    """

    queries: str
    num_queries: int
    recall_at_10: float


def calibrate(
    vectors: VectorSource, exact: Backend, plan: Plan, search: Search, texts: np.ndarray | None
) -> tuple[Plan, tuple[Recall, ...]]:
    """Return the cheapest setting that finds enough for every kind of queries, and what each then finds.

    Where none does, the setting with the best recall of its worst kind.

    Args:
        vectors: What is searched.
        exact: Gives the truth.
        plan: The structure.
        search: Searches it (queries, top_k, setting).
        texts: Embedded texts (texts, dim); measured by stored vectors alone if None or empty.
    """
    rows = np.sort(
        np.random.default_rng(1).choice(vectors.num_rows, min(NUM_STORED, vectors.num_rows), replace=False)
    )
    kinds = {"stored": (vectors.gather(rows).astype(np.float32), rows)}
    if texts is not None and len(texts):
        kinds["texts"] = (texts.astype(np.float32), np.full(len(texts), -1))
    truths = {name: exact.search(queries, TOP_K + 1) for name, (queries, _) in kinds.items()}
    failed: list[Plan] = []
    best: tuple[float, Plan, tuple[Recall, ...]] | None = None
    for setting in settings_of(plan, vectors.num_rows):
        if any(setting.breadth <= other.breadth and setting.depth <= other.depth for other in failed):
            continue
        recalls = []
        for name, (queries, own) in kinds.items():
            shares = recall_of(search(queries, TOP_K + 1, setting), truths[name], own)
            recalls.append(Recall(queries=name, num_queries=len(queries), recall_at_10=float(shares.mean())))
        worst = min(recall.recall_at_10 for recall in recalls)
        if best is None or worst > best[0]:
            best = worst, setting, tuple(recalls)
        if worst >= TARGET_RECALL:
            break
        failed.append(setting)
    assert best is not None
    return best[1], best[2]


def recall_of(
    found: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray], own: np.ndarray
) -> np.ndarray:
    """Return for each query the share of its ten best that were found; what ties with the tenth counts.

    Args:
        found: Scores and rows (queries, at least 11) of the search under test.
        truth: The same of exact search.
        own: (queries,) the row that a query is, which does not count; -1 if it is none.
    """
    shares = np.empty(len(own))
    for query, row in enumerate(own.tolist()):
        best = truth[0][query][(truth[1][query] >= 0) & (truth[1][query] != row)][:TOP_K]
        scores = found[0][query][(found[1][query] >= 0) & (found[1][query] != row)][:TOP_K]
        shares[query] = np.count_nonzero(scores >= best[-1]) / len(best) if len(best) else 1.0
    return shares
