"""What validation measured while the arms of a study learned, kept beside their cards."""

from __future__ import annotations

import json
from pathlib import Path

from vlm.training.checkpoint import replace_durably
from vlm.training.studies.config import StudyConfig


def curve_of(folder: Path, arm: str, seed: int) -> Path:
    """Return where an arm's curve is kept once it is measured."""
    return folder / "cards" / f"{arm}-{seed}.curve.json"


def kept_curve(study: StudyConfig, arm: str, seed: int, folder: Path) -> list[tuple[int, float]]:
    """Return (clips seen, what validation measured) of all stages of an arm that were evaluated.

    It is kept beside the cards, so that a study can be gone on with where its runs are not.
    """
    kept = curve_of(folder, arm, seed)
    if kept.exists():
        return [(int(clips), float(value)) for clips, value in json.loads(kept.read_text(encoding="utf-8"))]
    points, before, name = [], 0, measure_of_curves(study, folder)
    stages = zip(study.stages(arm, seed, folder), study.training(arm, seed, folder), strict=True)
    for (_, _, run), config in stages:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if f"val/{name}" in row:
                points.append((before + row["step"] * config.train.batch_size, float(row[f"val/{name}"])))
        before += config.train.max_steps * config.train.batch_size
    replace_durably(kept, json.dumps(points).encode())
    return points


def measure_of_curves(study: StudyConfig, folder: Path) -> str:
    """Return what validation looks for in the last stage of the first arm."""
    arm = next(iter(study.arms))
    return study.training(arm, study.seeds[0], folder)[-1].evaluation.best
