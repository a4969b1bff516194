"""Cards of answers, classes and moments: their measures as tables, and the plots that these allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vlm.evaluation.card import DIRECTIONS, Card
from vlm.evaluation.page.plots import Curve

Rows = dict[str, Mapping[str, Any]]
_ENDS = ("value", "low", "high")
_TENTHS = [tenth / 10 for tenth in range(0, 11, 2)]


class Plot(NamedTuple):
    """Curves over a linear axis, what its axes are, where the first is marked, and what is to say below."""

    curves: list[Curve]
    x_label: str
    y_label: str
    ticks: list[float]
    caption: str


def is_task(card: Card) -> bool:
    """Whether a card is of answers, classes or moments rather than of retrieval."""
    return not any(direction in card["results"] for direction in DIRECTIONS)


def headline(card: Card) -> tuple[str, Mapping[str, float] | None]:
    """Return the name of the one measure that a card of these tasks is quoted by, and the measure."""
    results = card["results"]
    if "multiple_choice" in results:
        return "accuracy", results["multiple_choice"]["all"]["accuracy"]
    if "answers" in results:
        return "exact match", results["answers"]["all"]["accuracy"]
    if "classification" in results:
        return "top-1", results["classification"]["top1"]
    kind, block = next(iter(results["moments"].items()))
    name = _middle_recall(card)
    return f"{name.replace('recall@', 'R@')}, {kind}", block[name]


def tables(card: Card) -> Iterator[tuple[str, Rows]]:
    """Yield title and rows of every table; a row is a name and its measures."""
    results = card["results"]
    if "multiple_choice" in results:
        yield "", dict(_choices(card))
    elif "answers" in results:
        yield (
            "",
            {
                f"{kind} ({block['num_questions']})": {
                    name: entry for name, entry in block.items() if name != "num_questions"
                }
                for kind, block in results["answers"].items()
            },
        )
    elif "classification" in results:
        views = card["protocol"]["views"]
        rows = {f"{views} views": results["classification"]} if views > 1 else {}
        yield "", rows | {"one view": results["single_view"], "guessing": card["chance"]}
        yield "Classes, the worst first", dict(_classes(card))
    else:
        yield "", {**results["moments"], **card["baselines"]["moments"]}
        for kind, lengths in card["lengths"].items():
            yield (
                f"By length of the true windows, {kind}",
                {
                    f"{name} ({block['num_queries']})": {
                        key: entry for key, entry in block.items() if key != "num_queries"
                    }
                    for name, block in lengths.items()
                },
            )
        if "highlights" in results:
            yield (
                "Highlights",
                {
                    f"{name}, {grade}": block
                    for name, grades in {**results["highlights"], **card["baselines"]["highlights"]}.items()
                    for grade, block in grades.items()
                },
            )


def plots(card: Card) -> Iterator[Plot]:
    """Yield calibration and abstention where a card has them, and recall over IoU of moments."""
    if "calibration" in card:
        bins = card["calibration"]["bins"]
        known = Curve("accuracy", [row["confidence"] for row in bins], [row["accuracy"] for row in bins])
        ideal = Curve("if every confidence were true", [0.0, 1.0], [0.0, 1.0], is_reference=True)
        caption = "Accuracy of answers by how sure the model was; its distance from the line is the error."
        yield Plot([known, ideal], "confidence", "accuracy", _TENTHS, caption)
    if "abstention" in card:
        curve = card["abstention"]["curve"]
        given = Curve("wrong", [row["coverage"] for row in curve], [row["risk"] for row in curve])
        flat = card["abstention"]["aurc_unordered"]["value"]
        guess = Curve("if confidence said nothing", [0.0, 1.0], [flat, flat], is_reference=True)
        caption = "The share of wrong answers among those given, when only the surest are given."
        yield Plot([given, guess], "share of questions answered", "wrong", _TENTHS, caption)
    if "moments" in card["results"]:
        ious = card["protocol"]["ious"]
        columns = {**card["results"]["moments"], **card["baselines"]["moments"]}
        curves = []
        for place, (name, block) in enumerate(columns.items()):
            entries = [block[f"recall@1@{iou:g}"] for iou in ious]
            value, low, high = ([entry.get(end, entry["value"]) for entry in entries] for end in _ENDS)
            curves.append(Curve(name, ious, value, low, high, colour=place))
        caption = (
            "The share of queries whose first window overlaps a true one that much; blind guesses beside."
        )
        yield Plot(curves, "intersection over union", "recall at 1", ious, caption)


def _choices(card: Card) -> Iterator[tuple[str, Mapping[str, Any]]]:
    results = card["results"]
    for kind, block in results["multiple_choice"].items():
        yield (
            f"{kind} ({block['num_questions']})",
            {
                "accuracy": block["accuracy"],
                "guessing": block["chance"],
                "always the most frequent place": block["most_frequent_place"],
            },
        )
    for name, block in results.get("multiple_choice_parts", {}).items():
        yield f"all, {name} alone", {"accuracy": block["accuracy"], "guessing": block["chance"]}


def _classes(card: Card) -> Iterator[tuple[str, Mapping[str, Any]]]:
    worst_first = sorted(card["classes"].items(), key=lambda item: (item[1]["top1"], item[0]))
    for name, block in worst_first:
        yield f"{name} ({block['num_videos']})", {"top1": {"value": block["top1"]}}


def _middle_recall(card: Card) -> str:
    ious = card["protocol"]["ious"]
    return f"recall@1@{ious[len(ious) // 2]:g}"
