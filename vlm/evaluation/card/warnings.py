"""What the reader of a card must know before its numbers mean anything, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm.evaluation.card import DIRECTIONS, TITLES, Card


def warnings(card: Card) -> list[str]:
    """Return what weakens a card's numbers, the gravest first; empty if nothing is known to."""
    return [*_leakage(card), *_at_chance(card), *_inputs(card), *_scores(card)]


def leakage_line(section: Mapping[str, Any]) -> str:
    """Return the card's ``leakage`` in words."""
    if section["status"] == "unchecked":
        return "leakage: unchecked: nobody looked for these videos in the training set (vlm data overlap)"
    ways = ", ".join(f"{way} {count}" for way, count in section["by"].items())
    parts = [f"{section['videos_shared']} of {section['videos']} videos are in the training set (by {ways})"]
    if "captions_shared" in section:
        parts.append(f"{section['captions_shared']} of {section['captions']} captions are among its captions")
    if section["videos_checked"] < section["videos"]:
        parts.append(f"only {section['videos_checked']} videos were looked at")
    return f"leakage: {section['status']}: {'; '.join(parts)}"


def _leakage(card: Card) -> Iterator[str]:
    section = card.get("leakage")
    if section and (
        section["status"] != "checked" or section["videos_shared"] or section.get("captions_shared")
    ):
        yield leakage_line(section)


def _at_chance(card: Card) -> Iterator[str]:
    for direction in DIRECTIONS:
        chance = card.get("chance", {}).get(direction, {}).get("recall@1")
        for kind, block in card["results"].get(direction, {}).items():
            if chance and "recall@1" in block and block["recall@1"]["low"] <= chance["value"]:
                yield f"{TITLES[direction]}, {kind}: R@1 is not above chance, {100 * chance['value']:.1f} %"


def _inputs(card: Card) -> Iterator[str]:
    data = card.get("data", {})
    if data.get("missing"):
        yield (
            f"{len(data['missing'])} clips missing or unreadable, left out; they are listed in the card, and "
            "a smaller gallery gives higher scores"
        )
    weights = card["model"].get("weights", {})
    if "status" in weights:
        yield f"official weights: {weights['status']}"
    if weights.get("missing") or weights.get("resized"):
        changed = ", ".join((*weights["missing"], *weights["resized"])[:3])
        yield f"weights were changed to fit: {changed}"
    if card.get("deviations"):
        yield f"input unlike that of the published numbers: {'; '.join(card['deviations'])}"
    if data.get("queries_truncated"):
        yield f"{data['queries_truncated']} queries are longer than the model reads, and were cut"
    if "queries_truncated" in data and data["queries_truncated"] is None:
        yield "whether queries were cut is not known: the model does not say how much of a text it reads"
    if data.get("statements_truncated"):
        yield f"{data['statements_truncated']} candidates are longer than the model reads, and were cut"
    if data.get("queries_with_unknown_words"):
        yield f"{data['queries_with_unknown_words']} queries have words that the model does not know"


def _scores(card: Card) -> Iterator[str]:
    for direction, kinds in card.get("ties", {}).items():
        for kind, count in kinds.items():
            if count:
                yield f"tied queries, {TITLES[direction]}, {kind}: {count}"
    for kind, entry in card.get("kinds", {}).items():
        if "warning" in entry:
            yield f"{kind}: {entry['warning']}"
    if "dsl" in card.get("kinds", {}) or "dsl" in card["results"].get("query_to_item", {}):
        yield "dsl is transductive: it uses all test queries, and no search for a single query has them"
    for name, control in card.get("controls", {}).items():
        if control.get("verdict"):
            yield f"control {name}: {control['verdict']}"
