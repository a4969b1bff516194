"""What a study found: each arm over its seeds, and differences between arms on the same clips and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import to_dict
from vlm.errors import InvalidInput, MissingExtra
from vlm.evaluation import Card, read_card
from vlm.evaluation.card import as_json
from vlm.evaluation.compare import differing_fields
from vlm.evaluation.protocol import BootstrapSettings
from vlm.metrics import paired_difference
from vlm.training.studies.config import StudyConfig
from vlm.training.studies.curves import kept_curve, measure_of_curves
from vlm.training.studies.measures import MEASURES, outcomes_of, values_of
from vlm.training.studies.runner import card_of

FORMAT = "vlm-study/1"
_CURVES = {"r1": "R@1 of validation clips, %", "order": "order in validation reels, %"}


def summarise(study: StudyConfig, folder: Path) -> dict[str, Any]:
    """Return the study's result, over the seeds that are complete.

    Returns:
        ``{"format", "study", "seeds", "arms": {arm: {test: {kind: {measure: {"values", "mean", "spread"}}}}},
        "differences": [{"from", "to", "test", "kind", "measure", "values", "mean", "low", "high"}]}``.
        ``spread`` is the standard deviation over seeds; a difference is one of R@1, or of each kind of claim;
        intervals resample clips (each with its twin) or groups of reels, with the mean over seeds of each
        outcome. Measures of reels have such an interval too, and ``ceiling``, the best that the sampled
        frames allow.

    Raises:
        InvalidInput: No seed is complete, or the cards were made on different clips.
    """
    seeds = [seed for seed in study.seeds if all(path.exists() for path in _cards(study, folder, seed))]
    if not seeds:
        raise InvalidInput(f"{folder}: no seed of the study is complete")
    cards = {
        (arm, test): [read_card(card_of(folder, arm, seed, test)) for seed in seeds]
        for arm in study.arms
        for test in study.tests
    }
    for test in study.tests:
        _check_equal_clips([card for (_, name), found in cards.items() if name == test for card in found])
    return {
        "format": FORMAT,
        "study": to_dict(study),
        "seeds": seeds,
        "arms": {arm: {test: _over_seeds(cards[arm, test]) for test in study.tests} for arm in study.arms},
        "differences": [
            {"from": first, "to": second, "test": test, **found}
            for first, second in study.differences
            for test in study.tests
            for found in _differences(cards[first, test], cards[second, test])
        ],
        "curves": {
            arm: {str(seed): kept_curve(study, arm, seed, folder) for seed in seeds} for arm in study.arms
        },
        "curve_of": measure_of_curves(study, folder),
        "environment": next(iter(cards.values()))[0]["environment"],
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown tables, percent, mean and standard deviation over seeds."""
    lines = [f"seeds {', '.join(map(str, result['seeds']))}"]
    for measures in MEASURES:
        rows = list(_rows(result["arms"], measures))
        if rows:
            names = " | ".join(MEASURES[measures])
            lines += ["", f"| | clips | score | {names} |", "| --- " * (3 + len(measures)) + "|", *rows]
    if "operations" in result:
        lines += ["", "| | operations of a training |", "| --- | --- |"]
        lines += [f"| {arm} | {number:.3g} |" for arm, number in result["operations"].items()]
    if result["differences"]:
        lines += [
            "",
            "| points | clips | score | of | mean | 95 % interval | each seed |",
            "| --- " * 7 + "|",
        ]
    for row in result["differences"]:
        interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        each = ", ".join(f"{100 * value:+.1f}" for value in row["values"])
        lines.append(
            f"| {row['to']} less {row['from']} | {row['test']} | {row['kind']} | {row['measure']} "
            f"| {100 * row['mean']:+.1f} | {interval} | {each} |"
        )
    return "\n".join(lines)


def _rows(arms: Mapping[str, Any], measures: tuple[str, ...]) -> Iterator[str]:
    """Yield a line for each arm, test and kind of score that has just these measures."""
    for arm, tests in arms.items():
        for test, kinds in tests.items():
            for kind, found in kinds.items():
                if tuple(found) == measures:
                    cells = " | ".join(_cell(found[name]) for name in measures)
                    yield f"| {arm} | {test} | {kind} | {cells} |"


def _cell(row: Mapping[str, Any]) -> str:
    text = f"{100 * row['mean']:.1f} ± {100 * row['spread']:.1f}"
    if "ceiling" not in row:
        return text
    return f"{text} [{100 * row['low']:.1f}, {100 * row['high']:.1f}] of {100 * row['ceiling']:.1f}"


def draw_study(result: Mapping[str, Any], file: Path) -> None:
    """Draw what validation measured over clips seen, a line a seed, a colour an arm.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "train", "the plot of a study") from error
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (arm, seeds) in enumerate(result["curves"].items()):
        for place, points in enumerate(seeds.values()):
            clips, values = [point[0] / 1000 for point in points], [100 * point[1] for point in points]
            axes.plot(clips, values, color=f"C{number}", linewidth=1.2, label=arm if place == 0 else None)
    axes.set_xlabel("thousand clips of training, all stages")
    axes.set_ylabel(_CURVES.get(result["curve_of"], f"{result['curve_of']} of validation clips, %"))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _cards(study: StudyConfig, folder: Path, seed: int) -> Iterator[Path]:
    for arm in study.arms:
        for test in study.tests:
            yield card_of(folder, arm, seed, test)


def _check_equal_clips(cards: list[Card]) -> None:
    for card in cards[1:]:
        differing = differing_fields(cards[0]["protocol"], card["protocol"])
        if differing:
            names = ", ".join(name for name, _, _ in differing)
            raise InvalidInput(
                f"the cards of the study were made by different protocols, which differ in: {names}"
            )


def _over_seeds(cards: list[Card]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    each = [values_of(card) for card in cards]
    for kind, measures in each[0].items():
        for measure, facts in measures.items():
            values = [card[kind][measure]["value"] for card in each]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row = {"values": values, "mean": statistics.fmean(values), "spread": spread}
            if "ceiling" in facts:
                right, groups = _outcomes(cards, kind, measure)
                block = as_json(
                    BootstrapSettings(**cards[0]["protocol"]["bootstrap"]).mean(right.mean(0), groups)
                )
                row |= {
                    "low": (block or {})["low"],
                    "high": (block or {})["high"],
                    "ceiling": facts["ceiling"],
                }
            found.setdefault(kind, {})[measure] = row
    return found


def _differences(first: list[Card], second: list[Card]) -> Iterator[dict[str, Any]]:
    for kind, measure in outcomes_of(first[0]):
        if (kind, measure) not in outcomes_of(second[0]):
            continue
        before, groups = _outcomes(first, kind, measure)
        after, _ = _outcomes(second, kind, measure)
        settings = first[0]["protocol"]["bootstrap"]
        interval = paired_difference(
            before.mean(0), after.mean(0), groups, resamples=settings["resamples"], seed=settings["seed"]
        )
        block = as_json(interval) or {}
        facts = {"kind": kind, "measure": measure, "values": (after - before).mean(1).tolist()}
        yield {**facts, "mean": block.pop("value"), **block}


def _outcomes(cards: list[Card], kind: str, measure: str) -> tuple[Any, Any]:
    """Return each outcome, (seeds, queries), and their groups."""
    found = [outcomes_of(card)[kind, measure] for card in cards]
    return np.stack([right for right, _ in found]), found[0][1]
