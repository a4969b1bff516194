"""What a study found: each arm over its seeds, and differences between arms on the same clips and seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import to_dict
from vlm.errors import InvalidInput, MissingExtra
from vlm.evaluation import Card, read_card
from vlm.evaluation.card import as_json, counts_from_json
from vlm.evaluation.compare import differing_fields
from vlm.metrics import paired_difference
from vlm.training.studies.config import StudyConfig
from vlm.training.studies.runner import card_of

FORMAT = "vlm-study/1"
MEASURES = ("recall@1", "pair_recall@1", "direction")


def summarise(study: StudyConfig, folder: Path) -> dict[str, Any]:
    """Return the study's result, over the seeds that are complete.

    Returns:
        ``{"format", "study", "seeds", "arms": {arm: {test: {kind: {measure: {"values", "mean", "spread"}}}}},
        "differences": [{"from", "to", "test", "kind", "values", "mean", "low", "high"}]}``. ``spread`` is the
        standard deviation over seeds; a difference is one of R@1, its interval resamples clips (each with
        its twin), with the mean over seeds of each query's outcome.

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
            {"from": first, "to": second, "test": test, "kind": kind, **found}
            for first, second in study.differences
            for test in study.tests
            for kind, found in _differences(cards[first, test], cards[second, test])
        ],
        "curves": {
            arm: {str(seed): _curve(study, arm, seed, folder) for seed in seeds} for arm in study.arms
        },
        "environment": next(iter(cards.values()))[0]["environment"],
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table, percent, mean and standard deviation over seeds."""
    lines = [f"seeds {', '.join(map(str, result['seeds']))}", ""]
    lines += ["| | clips | score | R@1 | R@1 of the pair | direction |", "| --- " * 6 + "|"]
    for arm, tests in result["arms"].items():
        for test, kinds in tests.items():
            for kind, measures in kinds.items():
                cells = [
                    f"{100 * measures[name]['mean']:.1f} ± {100 * measures[name]['spread']:.1f}"
                    for name in MEASURES
                ]
                lines.append(f"| {arm} | {test} | {kind} | {' | '.join(cells)} |")
    if result["differences"]:
        lines += [
            "",
            "| R@1, points | clips | score | mean | 95 % interval | each seed |",
            "| --- " * 6 + "|",
        ]
    for row in result["differences"]:
        interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        each = ", ".join(f"{100 * value:+.1f}" for value in row["values"])
        lines.append(
            f"| {row['to']} less {row['from']} | {row['test']} | {row['kind']} "
            f"| {100 * row['mean']:+.1f} | {interval} | {each} |"
        )
    return "\n".join(lines)


def draw_study(result: Mapping[str, Any], file: Path) -> None:
    """Draw R@1 of the validation clips over clips seen, a line a seed, a colour an arm.

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
    axes.set_ylabel("R@1 of validation clips, %")
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
    for kind in cards[0]["twins"]:
        for measure in MEASURES:
            values = [float(card["twins"][kind][measure]["value"]) for card in cards]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row = {"values": values, "mean": statistics.fmean(values), "spread": spread}
            found.setdefault(kind, {})[measure] = row
    return found


def _differences(first: list[Card], second: list[Card]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in first[0]["per_query"]["query_to_item"]:
        if kind not in second[0]["per_query"]["query_to_item"]:
            continue
        before, groups = _hits(first, kind)
        after, _ = _hits(second, kind)
        settings = first[0]["protocol"]["bootstrap"]
        interval = paired_difference(
            before.mean(0), after.mean(0), groups, resamples=settings["resamples"], seed=settings["seed"]
        )
        block = as_json(interval) or {}
        yield kind, {"values": (after - before).mean(1).tolist(), "mean": block.pop("value"), **block}


def _hits(cards: list[Card], kind: str) -> tuple[Any, Any]:
    """Return each query's expected hit at 1, (seeds, queries), and the queries' groups."""
    blocks = [counts_from_json(card["per_query"]["query_to_item"][kind]) for card in cards]
    return np.stack([counts.recall(1) for counts, _ in blocks]), blocks[0][1]


def _curve(study: StudyConfig, arm: str, seed: int, folder: Path) -> list[tuple[int, float]]:
    """Return (clips seen, validation R@1) of all stages of an arm that were evaluated."""
    points, before = [], 0
    stages = zip(study.stages(arm, seed, folder), study.training(arm, seed, folder), strict=True)
    for (_, _, run), config in stages:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "val/r1" in row:
                points.append((before + row["step"] * config.train.batch_size, float(row["val/r1"])))
        before += config.train.max_steps * config.train.batch_size
    return points
