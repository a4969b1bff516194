"""What a run leaves to read: exact metrics, speed apart from them, curves, and its circumstances."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm import __version__
from vlm.models.weights.folder import is_model_folder, read_card
from vlm.training.reports.boards import Board

_log = logging.getLogger(__name__)


class Tracker:
    """Appends JSON lines to ``RUN/metrics.jsonl`` (repeatable numbers) and ``RUN/speed.jsonl`` (timings).

    The first is equal to the bit for equal seeds on one machine, also across a resume: lines after the
    resumed step are dropped, since the run writes them again.
    """

    def __init__(self, run: Path, resumed_step: int = 0, boards: Sequence[Board] = ()) -> None:
        self.metrics_path = run / "metrics.jsonl"
        self.speed_path = run / "speed.jsonl"
        for path in (self.metrics_path, self.speed_path):
            _truncate(path, resumed_step)
        self._metrics = self.metrics_path.open("a", encoding="utf-8")
        self._speed = self.speed_path.open("a", encoding="utf-8")
        self._boards = boards

    def metrics(self, step: int, **values: float) -> None:
        """Append repeatable numbers of the update ``step`` (counted from 1)."""
        _append(self._metrics, {"step": step, **values})
        for board in self._boards:
            board.add(step, values)

    def speed(self, step: int, **values: float) -> None:
        """Append timings of the update ``step``."""
        _append(self._speed, {"step": step, **{name: round(value, 4) for name, value in values.items()}})
        for board in self._boards:
            board.add(step, {f"speed/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Close the files and the boards."""
        self._metrics.close()
        self._speed.close()
        for board in self._boards:
            board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a torn last line is left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def best_value(path: Path, name: str, step: int) -> float:
    """Return the largest value of a metric up to a step, minus infinity if there is none."""
    lines = [line for line in read_lines(path) if line["step"] <= step and name in line]
    return max((float(line[name]) for line in lines), default=-math.inf)


def training_s(run: Path) -> float:
    """Return the seconds that a run's updates took, without evaluation and saving."""
    total, before = 0.0, 0
    for line in read_lines(run / "speed.jsonl"):
        total += line["step_s"] * (line["step"] - before)
        before = line["step"]
    return total


def circumstances(seed: int, source: str | None = None) -> dict[str, Any]:
    """Return what the numbers of a run depend on besides its config: versions, machine, threads, seed.

    Args:
        seed: Of the run.
        source: The model that it starts from: of a model folder its name, hash and own circumstances are
            kept, so that the last model of several stages tells them all.
    """
    before = {} if source is None else {"started_from": _origin(source)}
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "vlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **before,
    }


def _origin(source: str) -> dict[str, Any]:
    if not is_model_folder(Path(source)):
        return {"source": source}
    card = read_card(source)
    return {name: card[name] for name in ("name", "weights_sha256", "training") if name in card}


def draw_curves(run: Path) -> None:
    """Draw ``RUN/curves.png`` from the metrics: losses on the left, retrieval on held-out clips right."""
    try:
        import matplotlib
    except ImportError:
        _log.warning("no curves.png: pip install 'videomamba-vlm[train]' brings matplotlib")
        return
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    lines = read_lines(run / "metrics.jsonl")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _plot(left, lines, [name for name in ("loss", "contrastive", "matching", "masked_language")], "loss")
    names = sorted({name for line in lines for name in line if name.startswith("val/")})
    _plot(right, lines, names, "fraction of held-out clips")
    right.set_ylim(0, 1)
    temporary = run / "curves.tmp.png"
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, run / "curves.png")


def _plot(axes: Any, lines: list[dict[str, Any]], names: list[str], label: str) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("val/"), linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if axes.lines:
        axes.legend()


def _append(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to ``step``, replacing the file in one move."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
