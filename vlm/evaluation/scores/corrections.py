"""Scores corrected for hubs, each under a name of its own, and what must be known to read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from vlm.errors import InvalidInput
from vlm.evaluation.outcomes import Outcomes
from vlm.metrics import Adjustment, Positives, bank_softmax, demand_share, dual_softmax

DEFAULT_SCALE = 20.0
_EVEN_DEMAND = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrections:
    """Which corrections are reported beside the raw scores.

    Attributes:
        dual_softmax: Report ``dsl``, which uses the other test queries.
        bank: (bank queries, items) scores of queries that are not under test, for ``bank``; None for none.
        bank_captions: Captions that are not under test; a model's run makes the bank of them.
        bank_source: What the bank was made from, for the card.
        scale: What scores are multiplied by within the softmax; 20 suits cosines.
    """

    dual_softmax: bool = False
    bank: NDArray[Any] | None = None
    bank_captions: tuple[str, ...] = ()
    bank_source: dict[str, Any] = field(default_factory=dict)
    scale: float = DEFAULT_SCALE


def add_corrections(
    outcomes: Outcomes, scores: NDArray[Any], positives: Positives, corrections: Corrections
) -> dict[str, Any]:
    """Rank corrected scores, and return the card's ``kinds`` section.

    A bank of queries corrects the search for items only; for one item all queries move alike.

    Args:
        outcomes: Holds the raw ``itc`` outcomes; gets those of ``dsl`` and ``bank``.
        scores: (queries, items), finite.
        positives: The right items of each query.
        corrections: What is asked for.

    Raises:
        InvalidInput: The bank or the scale cannot be used.
    """
    section: dict[str, Any] = {}
    try:
        if corrections.dual_softmax:
            _add_dual_softmax(outcomes, scores, positives, corrections.scale)
            section["dsl"] = _dual_softmax_section(positives, corrections.scale)
        if corrections.bank is not None:
            if corrections.bank.shape[1:] != scores.shape[1:]:
                raise ValueError(f"expected {scores.shape[1]} items, got shape {corrections.bank.shape}")
            adjust = bank_softmax(corrections.bank, corrections.scale)
            _add(outcomes, "query_to_item", "bank", scores, positives, adjust)
            settings = {"scale": corrections.scale, "num_queries": len(corrections.bank)}
            section["bank"] = {"inductive": True, "settings": settings | corrections.bank_source}
    except ValueError as error:
        raise InvalidInput(f"correction of the scores: {error}") from error
    return section


def _add_dual_softmax(outcomes: Outcomes, scores: NDArray[Any], positives: Positives, scale: float) -> None:
    _add(outcomes, "query_to_item", "dsl", scores, positives, dual_softmax(scores, scale))
    _add(outcomes, "item_to_query", "dsl", scores.T, positives, dual_softmax(scores.T, scale))


def _add(
    outcomes: Outcomes,
    direction: str,
    kind: str,
    scores: NDArray[Any],
    positives: Positives,
    adjust: Adjustment,
) -> None:
    outcomes.rank(direction, kind, scores, positives, outcomes.ranks[direction]["itc"][1], adjust)


def _dual_softmax_section(positives: Positives, scale: float) -> dict[str, Any]:
    share = demand_share(positives)
    section: dict[str, Any] = {
        "transductive": True,
        "settings": {"scale": scale},
        "demand_share": share,
    }
    if share < _EVEN_DEMAND:
        section["warning"] = (
            "dual softmax takes every item to be wanted alike, but these queries want as much as "
            f"{max(1, round(share * positives.num_items))} of {positives.num_items} items wanted alike would"
        )
    return section
