"""The parts of a card that show rather than sum up: score histogram, hubs, recall against k, examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation.outcomes import Outcomes
from vlm.metrics import (
    Positives,
    RankCounts,
    first_items,
    occurrences,
    score_histogram,
    skewness,
)

HUB_DEPTH = 10
_NUM_HUBS = 5
_NUM_EXAMPLES = 5
_STEPS = (1, 2, 3, 5, 7)


def inspect_scores(
    outcomes: Outcomes,
    kind: str,
    scores: NDArray[Any],
    positives: Positives,
    *,
    item_names: Sequence[str] = (),
    queries: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the card's sections ``histogram``, ``hubness`` and ``examples`` of a full score matrix.

    Args:
        outcomes: Holds the ranks of these scores.
        kind: Name of the kind of score.
        scores: (queries, items), finite.
        positives: The right items of each query.
        item_names: What items are called; empty if only their columns are known.
        queries: Their texts; empty if not known.
    """
    found = score_histogram(scores, positives)
    sections: dict[str, Any] = {
        "histogram": {
            "kind": kind,
            "edges": found.edges.tolist(),
            "positives": found.positives.tolist(),
            "negatives": found.negatives.tolist(),
        }
    }
    if positives.num_items > HUB_DEPTH:
        sections["hubness"] = {"kind": kind, **_hubness(scores, item_names)}
    counts = outcomes.ranks["query_to_item"][kind][0]
    sections["examples"] = {"kind": kind, **_examples(scores, positives, counts, item_names, queries)}
    return sections


def recall_curves(outcomes: Outcomes) -> dict[str, Any]:
    """Return R@k of every direction and kind of score, for k from 1 as far as items were scored."""
    return {
        direction: {kind: _curve(counts) for kind, (counts, _) in kinds.items()}
        for direction, kinds in outcomes.ranks.items()
    }


def _curve(counts: RankCounts) -> dict[str, Any]:
    steps = {step * 10**power for power in range(9) for step in _STEPS}
    ks = sorted({k for k in steps if k < counts.num_scored} | {counts.num_scored})
    return {"k": ks, "recall": [float(counts.recall(k).mean()) for k in ks]}


def _hubness(scores: NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return how unevenly the first ten places of all queries fall on the items.

    With equal shares each item would be there ``expected`` times.
    """
    counts = occurrences(scores, HUB_DEPTH)
    order = np.argsort(-counts, kind="stable")[:_NUM_HUBS].tolist()
    return {
        "k": HUB_DEPTH,
        "skewness": skewness(counts),
        "expected": HUB_DEPTH * len(scores) / len(counts),
        "num_never": int(np.count_nonzero(counts == 0)),
        "most_frequent": [{**_item(item, names), "occurrences": float(counts[item])} for item in order],
    }


def _examples(
    scores: NDArray[Any],
    positives: Positives,
    counts: RankCounts,
    names: Sequence[str],
    queries: Sequence[str],
) -> dict[str, Any]:
    """Return the queries whose right item stands highest and lowest; equal ranks go by the margin."""
    found, ranks = first_items(scores, positives), counts.expected_rank()
    order = np.lexsort((-found.margin, ranks)).tolist()
    size = min(_NUM_EXAMPLES, len(order) // 2)

    def describe(query: int) -> dict[str, Any]:
        first, right = int(found.first[query]), int(found.right[query])
        return {
            "query": query,
            **({"caption": queries[query]} if queries else {}),
            "rank": float(ranks[query]),
            "right": {**_item(right, names), "score": float(found.right_score[query])},
            "first": {**_item(first, names), "score": float(found.first_score[query])},
        }

    return {
        "best": [describe(query) for query in order[:size]],
        "worst": [describe(query) for query in order[len(order) - size :][::-1]],
    }


def _item(column: int, names: Sequence[str]) -> dict[str, Any]:
    return {"item": column, **({"name": names[column]} if names else {})}
