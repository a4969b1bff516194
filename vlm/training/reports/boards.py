"""Metrics for TensorBoard and Weights & Biases, beside the run's own JSON lines, which stay the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from vlm.errors import MissingExtra

BoardName = Literal["tensorboard", "wandb"]
_WANDB_ID = "wandb-id"


class Board(Protocol):
    """Something that shows numbers by step."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Show the numbers of one step."""

    def close(self) -> None:
        """Write what is not written yet."""


def open_boards(
    names: Sequence[BoardName], run: Path, resumed_step: int, settings: dict[str, Any]
) -> list[Board]:
    """Return the boards of a run.

    Args:
        names: Which ones.
        run: The run's folder; TensorBoard's files are in its ``tensorboard``, W&B's in its ``wandb``.
        resumed_step: What was shown after this step is replaced.
        settings: The resolved config.

    Raises:
        MissingExtra: A board's package is not installed.
    """
    makers: dict[BoardName, Callable[..., Board]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    return [makers[name](run, resumed_step, settings) for name in names]


class _TensorBoard:
    """Event files in ``RUN/tensorboard``; ``tensorboard --logdir RUN`` shows them."""

    def __init__(self, run: Path, resumed_step: int, _settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "train", "train.boards") from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A W&B run, continued under its own id; its usual variables (WANDB_PROJECT, WANDB_MODE, ...) apply."""

    def __init__(self, run: Path, _resumed_step: int, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "wandb", "train.boards") from error
        place = run / _WANDB_ID
        number = place.read_text(encoding="utf-8") if place.exists() else wandb.util.generate_id()
        self._run = wandb.init(dir=str(run), id=number, resume="allow", config=settings)
        place.write_text(number, encoding="utf-8")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
