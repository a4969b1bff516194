"""Do what a study still lacks: trainings, clips, cards. Each is a command of its own, and whole or absent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import VlmError
from vlm.training.studies.config import StudyConfig
from vlm.training.studies.curves import kept_curve

Command = Callable[[list[str]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One command of a study; it is done when ``result`` exists, or all that was wanted of it.

    ``measures`` is the arm and the seed whose model it measures, and whose curve is kept then.
    """

    title: str
    arguments: list[str]
    result: Path
    wanted_for: tuple[Path, ...] = ()
    measures: tuple[str, int] | None = None

    @property
    def is_done(self) -> bool:
        """Whether its result is there, or no longer needed: cards outlive the runs that they measured."""
        return self.result.exists() or (
            bool(self.wanted_for) and all(path.exists() for path in self.wanted_for)
        )


def jobs(study: StudyConfig, folder: Path) -> Iterator[Job]:
    """Yield every job, so that all arms of the first seed are complete before the second begins."""
    for name, clips in study.tests.items():
        if clips.measure == "reels":  # which are drawn where they are looked at
            continue
        place = folder / "clips" / name
        arguments = ["data", "world", "--split", clips.split, "--seed", str(clips.seed), "--twins"]
        arguments += ["--count", str(clips.count), "--out", str(place)]
        yield Job(f"clips of {name}", arguments, place / "manifest.jsonl")
    for seed in study.seeds:
        for arm in study.arms:
            yield from _train_and_measure(study, arm, seed, folder)


def card_of(folder: Path, arm: str, seed: int, test: str) -> Path:
    """Return where the card of an arm's model lies."""
    return folder / "cards" / f"{arm}-{seed}-{test}.json"


def run_jobs(
    study: StudyConfig, folder: Path, announce: Callable[[str], None], command: Command | None = None
) -> None:
    """Do all jobs that are not done; what was stopped goes on where it was.

    Args:
        study: What to do.
        folder: Runs, clips and cards of the study.
        announce: Told before each job which one it is.
        command: Runs ``vlm`` with these arguments; a process of its own unless given.

    Raises:
        VlmError: A command failed; its output says why.
    """
    waiting = [job for job in jobs(study, folder) if not job.is_done]
    for number, job in enumerate(waiting, start=1):
        announce(f"{study.name}: {number} of {len(waiting)}, {job.title}")
        (command or _in_a_process)(job.arguments)
        if not job.is_done:
            raise VlmError(f"{job.title}: the command ended well, but {job.result} is not there")
        if job.measures is not None:
            kept_curve(study, *job.measures, folder)


def _train_and_measure(study: StudyConfig, arm: str, seed: int, folder: Path) -> Iterator[Job]:
    run = folder
    cards = tuple(card_of(folder, arm, seed, test) for test in study.tests)
    for number, (recipe, changes, run) in enumerate(study.stages(arm, seed, folder), start=1):
        arguments = ["train", str(recipe), *(word for change in changes for word in ("--set", change))]
        arguments += ["--resume" if (run / "config.yaml").exists() else "--out", str(run)]
        # the curves are drawn after the last update, and the model is written after them
        yield Job(f"{arm}, seed {seed}, stage {number}", arguments, run / "model" / "card.json", cards)
    for test, chosen in study.tests.items():
        clips, card = folder / "clips" / test, card_of(folder, arm, seed, test)
        if chosen.measure == "reels":
            arguments = ["eval", "reels", "--split", chosen.split]
            arguments += ["--seed", str(chosen.seed), "--count", str(chosen.count)]
        else:
            arguments = ["eval", "retrieval", "--protocol", "world", "--no-test-time-controls"]
            arguments += ["--annotations", str(clips / "manifest.jsonl"), "--videos", str(clips)]
        arguments += ["--model", str(run / "model"), "--out", str(card)]
        yield Job(f"{arm}, seed {seed}, measured on {test}", arguments, card, measures=(arm, seed))


def _in_a_process(arguments: list[str]) -> None:
    found = subprocess.run([sys.executable, "-m", "vlm", *arguments], stdout=subprocess.DEVNULL, check=False)
    if found.returncode:
        raise VlmError(f"vlm {' '.join(arguments)} ended with exit code {found.returncode}")
