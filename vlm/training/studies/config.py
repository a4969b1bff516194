"""StudyConfig: what is trained, from which seeds, and what the models are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.assets import asset
from vlm.config import load_config
from vlm.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One training run; a later stage of an arm starts from the model of the one before.

    Attributes:
        config: A training YAML, relative to the working folder or among the shipped files.
        set: ``key=value`` changes to it; ``{seed}`` stands for the seed.
    """

    config: str
    set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TestConfig:
    """Clips of the digit world on which every model is measured.

    Attributes:
        measure: ``retrieval`` of single clips, twins included; or ``reels``: claims about many short scenes
            in a row, who was there and who came first.
        split: Of the world; never the one that is trained on.
        seed: Which scenes.
        count: Scenes, each with its reversed twin; or groups of four reels.
    """

    measure: Literal["retrieval", "reels"] = "retrieval"
    split: Literal["val", "test", "combo"] = "test"
    seed: int = 1
    count: int = 500

    __test__ = False  # not a test class, whatever its name

    def __post_init__(self) -> None:
        if self.measure == "reels" and self.split == "combo":
            raise ValueError("tests: reels are of the splits val and test, not of combo")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """A study.

    Attributes:
        name: Its short name.
        question: What it is to find out.
        seeds: Of the training; each arm is trained from each.
        arms: Name → its stages, one after the other.
        tests: Name → clips.
        differences: Pairs of arms, (from, to), of which the difference is printed.
    """

    name: str
    question: str
    arms: Mapping[str, tuple[StageConfig, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    tests: Mapping[str, TestConfig] = field(default_factory=lambda: {"test": TestConfig()})
    differences: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        if not self.arms or not self.tests or not all(self.arms.values()):
            raise ValueError("arms and tests must not be empty, and an arm needs a stage")
        for name in {name for pair in self.differences for name in pair}:
            if name not in self.arms:
                raise ValueError(f"differences: no arm {name!r}; the arms are {', '.join(self.arms)}")

    def stages(self, arm: str, seed: int, folder: Path) -> list[tuple[Path, list[str], Path]]:
        """Return (training YAML, changes to it, folder of the run) of each stage of an arm."""
        found: list[tuple[Path, list[str], Path]] = []
        for number, stage in enumerate(self.arms[arm], start=1):
            changes = [change.replace("{seed}", str(seed)) for change in stage.set] + [f"seed={seed}"]
            if found:
                changes.append(f"train.init_from={found[-1][2] / 'model'}")
            found.append((_recipe(stage.config), changes, folder / "runs" / f"{arm}-{seed}-{number}"))
        return found

    def training(self, arm: str, seed: int, folder: Path) -> list[TrainingConfig]:
        """Return the training configuration of each stage of an arm, checked."""
        return [
            load_config(TrainingConfig, recipe, changes)
            for recipe, changes, _run in self.stages(arm, seed, folder)
        ]


def _recipe(name: str) -> Path:
    path = Path(name)
    return path if path.exists() else asset(name)
