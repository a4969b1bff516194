"""What a study reads of a card, of whatever kind the card is: figures, and outcomes that can be compared."""

from __future__ import annotations

import numpy as np

from vlm.evaluation import Card
from vlm.evaluation.card import counts_from_json
from vlm.metrics.matrices import Floats, Ints

# the measures of a kind of card → how a table heads them
MEASURES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("recall@1", "pair_recall@1", "direction"): ("R@1", "R@1 of the pair", "direction"),
    ("presence", "order"): ("presence, of the best", "order, of the best"),
}


def values_of(card: Card) -> dict[str, dict[str, dict[str, float]]]:
    """Return kind of score → measure → ``{"value"}``, with ``ceiling`` where the card knows one."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    if "reels" in card:
        for measure, row in card["reels"].items():
            facts = {"value": float(row["accuracy"]["value"]), "ceiling": float(row["ceiling"]["value"])}
            found.setdefault(card["score"], {})[measure] = facts
        return found
    for kind, block in card["twins"].items():
        found[kind] = {
            name: {"value": float(block[name]["value"])}
            for name in ("recall@1", "pair_recall@1", "direction")
        }
    return found


def outcomes_of(card: Card) -> dict[tuple[str, str], tuple[Floats, Ints]]:
    """Return (kind of score, measure) → the outcome of each query in [0, 1], and the query's group."""
    if "reels" in card:
        return {
            (kind, measure): (np.asarray(block["right"], np.float64), np.asarray(block["groups"], np.int64))
            for measure, kinds in card["per_query"].items()
            for kind, block in kinds.items()
        }
    return {
        (kind, "recall@1"): (counts_from_json(block).recall(1), np.asarray(block["groups"], np.int64))
        for kind, block in card["per_query"]["query_to_item"].items()
    }
