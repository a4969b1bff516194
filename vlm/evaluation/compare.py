"""Two cards side by side: paired differences on the same queries, or a refusal that says why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm.errors import InvalidInput
from vlm.evaluation.card import Card, as_json, counts_from_json
from vlm.metrics import paired_difference
from vlm.metrics.matrices import Floats


def compare_cards(first: Card, second: Card, names: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """Return ``second - first`` with 95 % intervals, for every direction and kind of score both have.

    Returns:
        ``{"protocol", "models": [a, b], "leakage": [a, b], "differences": {direction: {kind: {measure:
        {"first", "second", "value", "low", "high"}}}}}``; leakage is None where a card says nothing of it.

    Raises:
        InvalidInput: The protocols differ (every field is named), the cards lack the outcome of each query,
            or they share no kind of score.
    """
    differing = differing_fields(first["protocol"], second["protocol"])
    if differing:
        lines = "; ".join(f"{field}: {a!r} and {b!r}" for field, a, b in differing)
        raise InvalidInput(
            f"{names[0]} and {names[1]} were measured by different protocols and cannot be compared: {lines}"
        )
    settings = first["protocol"]["bootstrap"]
    recall_at = first["protocol"].get("recall_at", [])
    differences: dict[str, Any] = {}
    for direction, kind, a, b in _shared(first, second, names):
        _check_settings(kind, first, second, names)
        block = _differences(a, b, recall_at, settings, names)
        differences.setdefault(direction, {})[kind] = block
    if not differences:
        raise InvalidInput(
            f"{names[0]} and {names[1]} share no kind of score, so there is nothing to compare"
        )
    return {
        "protocol": first["protocol"],
        "models": [first["model"], second["model"]],
        "leakage": [first.get("leakage"), second.get("leakage")],
        "differences": differences,
    }


def differing_fields(first: Any, second: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted field, first value, second value) wherever two protocols differ."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found = []
        for key in sorted({*first, *second}, key=str):
            missing = "(absent)"
            found += differing_fields(first.get(key, missing), second.get(key, missing), f"{prefix}{key}.")
        return found
    return [] if first == second else [(prefix.rstrip("."), first, second)]


def _shared(first: Card, second: Card, names: tuple[str, str]) -> Iterator[tuple[str, str, Any, Any]]:
    for card, name in zip((first, second), names, strict=True):
        if not isinstance(card.get("per_query"), dict):
            raise InvalidInput(
                f"{name}: the card lacks 'per_query', the outcome of each query; evaluate again"
            )
    for direction, kinds in first["per_query"].items():
        for kind, block in kinds.items():
            other = second["per_query"].get(direction, {}).get(kind)
            if other is not None:
                yield direction, kind, block, other


def _check_settings(kind: str, first: Card, second: Card, names: tuple[str, str]) -> None:
    a, b = (card.get("kinds", {}).get(kind, {}).get("settings", {}) for card in (first, second))
    differing = differing_fields(a, b)
    if differing:
        lines = "; ".join(f"{field}: {left!r} and {right!r}" for field, left, right in differing)
        raise InvalidInput(f"{names[0]} and {names[1]} have {kind} scores of different settings: {lines}")


def _differences(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    recall_at: list[int],
    settings: Mapping[str, int],
    names: tuple[str, str],
) -> dict[str, Any]:
    if first["groups"] != second["groups"]:
        raise InvalidInput(f"{names[0]} and {names[1]} hold different queries although their protocols agree")
    block: dict[str, Any] = {}
    for name, left, right in _measures(first, second, recall_at):
        interval = paired_difference(
            left, right, first["groups"], resamples=settings["resamples"], seed=settings["seed"]
        )
        block[name] = {
            "first": float(left.mean()),
            "second": float(right.mean()),
            **(as_json(interval) or {}),
        }
    return block


def _measures(
    first: Mapping[str, Any], second: Mapping[str, Any], recall_at: list[int]
) -> Iterator[tuple[str, Floats, Floats]]:
    if "right" in first:
        yield "accuracy", np.asarray(first["right"], np.float64), np.asarray(second["right"], np.float64)
        return
    if "values" in first:
        for name, values in first["values"].items():
            if name in second["values"]:
                yield name, np.asarray(values, np.float64), np.asarray(second["values"][name], np.float64)
        return
    a, b = counts_from_json(first), counts_from_json(second)
    for k in recall_at:
        if k <= min(a.num_scored, b.num_scored):
            yield f"recall@{k}", a.recall(k), b.recall(k)
    gains = {"ndcg@10": (a.ndcg, b.ndcg), "map": (a.average_precision, b.average_precision)}
    for name, (left, right) in gains.items():
        if left is not None and right is not None:
            yield name, left, right
    if a.has_ranks and b.has_ranks:
        yield "mean_rank", a.expected_rank(), b.expected_rank()
