"""A training run from its config to a model folder, in the order in which it happens."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vlm import distributed
from vlm.config import dump, load_config, to_dict
from vlm.crashes import crash_point
from vlm.errors import ConfigError, Interrupted, InvalidInput, VlmError
from vlm.models.classifier import EncoderModel
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.models.weights import save_model, sweep_partial
from vlm.progress import progress_bar
from vlm.training import adapters
from vlm.training.average import MovingAverage
from vlm.training.checkpoint import (
    CheckpointStore,
    load_tensors,
    replace_durably,
    save_tensors,
    sole_writer,
    together,
    verify,
)
from vlm.training.config import TrainingConfig, forbidden_changes
from vlm.training.engine import Engine
from vlm.training.reports.boards import open_boards
from vlm.training.reports.diagnosis import first_bad_tensor
from vlm.training.reports.tracking import Tracker, best_value, circumstances, draw_curves, training_s
from vlm.training.schedule import learning_rate
from vlm.training.setup import make_engine, make_model, make_objective, make_tokenizer, prepare_process
from vlm.training.sources.opening import open_source
from vlm.training.validation import make_validation
from vlm.types import Batch

_AVERAGE = "average.pt"
_CONFIG = "config.yaml"
_ENVIRONMENT = "environment.json"


def train(config: TrainingConfig, run: Path, *, resume: bool | None = False) -> Path:
    """Train a model and return its folder, ``RUN/model``.

    Args:
        config: What to train; written to ``RUN/config.yaml`` in full.
        run: The run's folder; new, unless ``resume``.
        resume: Continue from the newest undamaged checkpoint, to the bit as if there had been no stop (plain
            engine; the same number of processes and threads on the same machine). None: if there is one.

    Raises:
        InvalidInput: The folder holds a run already, or none to resume.
        BusyError: Another process writes this run.
        ConfigError: The config does not fit, or differs from the resumed run's in what is learned.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        VlmError: The loss is not finite.
    """
    device = prepare_process(config)
    if resume is None:  # asked of one process, before it writes what the others would see
        resume = distributed.broadcast_object((run / _CONFIG).is_file() if distributed.is_main() else None)
    _check_folder(config, run, resume)
    with sole_writer(run):
        state = build(config, run, device)  # before anything is written: a config that fails leaves no run
        together(lambda: _prepare_folder(config, run, resume))
        return _learn(config, run, state, resume)


def _learn(config: TrainingConfig, run: Path, state: RunState, resume: bool) -> Path:
    """Do all updates that are left; return the model's folder."""
    done = state.restore() if resume else 0
    last, evaluation = config.train.max_steps, config.evaluation
    validation = make_validation(config, state.model) if evaluation.every and done < last else None
    clock = _Clock()
    best = best_value(run / "metrics.jsonl", f"val/{evaluation.best}", done)
    with (
        _tracking(config, run, done) as tracker,
        open_source(config, state.model, done, run) as batches,
        _Signals() as signals,
        _bar(last, done) as bar,
    ):
        while done < last:
            with clock.waiting():
                parts: list[Any] = [next(batches) for _ in range(config.train.accumulate)]
            clock.count(sum(len(part.video) for part in parts) * distributed.world_size())
            values = state.update(parts, done, signals.number)
            done += 1
            stop_signal = int(values.pop("stop"))
            if validation is not None and (done % evaluation.every == 0 or done == last):
                with clock.pausing(), state.average.applied():
                    values |= {f"val/{name}": value for name, value in validation.run().items()}
                    best = _keep_best(config, state.model, run, done, values, best)
            _report(tracker, bar, clock, done, values, config.train.log_every)
            if done % config.checkpoint.every == 0 or done == last or stop_signal:
                with clock.pausing():
                    state.save(done)
            if stop_signal:
                raise Interrupted(
                    f"stopped after step {done}, saved; continue with vlm train CONFIG --resume {run}",
                    stop_signal,
                )
    return _finish(config, state, run)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The objects that a run updates and saves.

    ``module`` is the model with its losses; ``base`` a hash of the weights that adapters stand beside, None
    if there are no adapters.
    """

    config: TrainingConfig
    model: VideoTextModel | EncoderModel
    module: nn.Module
    engine: Engine
    average: MovingAverage
    store: CheckpointStore
    base: str | None

    def update(self, parts: Sequence[Any], step: int, signal_number: int) -> dict[str, float]:
        """Do update ``step`` (from 0) with the parts of its batch.

        Returns:
            Its metrics, means over parts and processes, and the signal to stop for.

        Raises:
            VlmError: The loss or the gradient is not finite.
        """
        rate = learning_rate(step, self.config.optimizer, self.config.train.max_steps)
        batches = list(enumerate(parts, step * len(parts)))
        losses = []
        for number, batch in batches:
            loss, terms = self.engine.losses(batch, number)
            losses.append({"loss": loss.detach(), **terms})
            self.engine.differentiate(loss)
        numbers = {"learning_rate": rate}
        if isinstance(self.model, VideoTextModel):
            numbers["temperature"] = float(self.model.temp.detach())
        norm = self.engine.update(rate)
        means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        values = _mean_over_processes(means, signal_number)
        values |= {**numbers, "gradient_norm": norm}
        if isinstance(parts[0], Batch) and parts[0].corpus:  # that of all parts
            values[f"loss/{parts[0].corpus}"] = values["loss"]
        shown = {name: value for name, value in values.items() if name != "stop"}
        wrong = [name for name, value in shown.items() if not abs(value) < float("inf")]
        if wrong:
            saved = self.store.list()
            where = first_bad_tensor(
                self.module, lambda: [self.engine.losses(batch, number) for number, batch in batches]
            )
            raise VlmError(
                f"step {step + 1}: {', '.join(wrong)} not finite ({shown})"
                + (f"; first of all {where}" if where else "")
                + "; continued it would come to the same: start a new run with --out and a lower "
                "optimizer.learning_rate or train.precision fp32"
                + (f", perhaps with train.init_from={saved[-1]}" if saved and self.base is None else "")
            )
        self.average.update(step)
        return values

    def save(self, done: int) -> None:
        """Save a checkpoint after ``done`` updates."""

        def write(folder: Path) -> None:
            self.engine.save(folder)
            crash_point("checkpoint-half-written")
            if distributed.is_main():
                save_tensors(folder / _AVERAGE, {"values": self.average.values})
                with self.average.applied():
                    if self.base is None:
                        save_model(self.model, folder / "model")
                    else:
                        adapters.save_adapter(self.model, folder / adapters.FOLDER)

        self.store.save(done, write, {"processes": distributed.world_size(), "base": self.base})

    def restore(self) -> int:
        """Load the newest undamaged checkpoint; return how many updates are done, 0 without one."""
        newest = distributed.broadcast_object(self.store.latest() if distributed.is_main() else None)
        together(self.store.sweep)
        if newest is None:
            return 0
        facts = verify(newest)
        if facts.get("base") != self.base:
            raise ConfigError(
                f"{newest}: its adapters belong to other weights than those of train.init_from "
                f"({self.config.train.init_from}); give the run the model that it started from"
            )
        self.engine.load(newest)
        self.average.load(load_tensors(newest / _AVERAGE, self.model.device)["values"])
        return int(facts["step"])


def build(config: TrainingConfig, run: Path, device: torch.device) -> RunState:
    """Make the objects of a run from its config, at update 0."""
    model = make_model(config, make_tokenizer(config), device)
    objective = make_objective(config, model)
    return RunState(
        config=config,
        model=model,
        module=objective,
        engine=make_engine(config, objective, device),
        average=MovingAverage(model, config.optimizer.ema_decay),
        store=CheckpointStore(run / "checkpoints", config.checkpoint.keep),
        base=adapters.frozen_hash(model) if config.train.lora else None,
    )


def _check_folder(config: TrainingConfig, run: Path, resume: bool) -> None:
    """Check that the folder fits what is asked, in every process before any writes to it."""
    before = run / _CONFIG
    if resume and not before.is_file():
        raise InvalidInput(f"{run}: no run to resume, {before.name} is missing; start one with --out {run}")
    if resume:
        changes = forbidden_changes(load_config(TrainingConfig, before), config)
        if changes:
            raise ConfigError(
                f"{run}: the config differs from the run's in what is learned:\n  "
                + "\n  ".join(changes)
                + "\nrestore these values, or start a new run with --out"
            )
    elif before.exists() or (run / "checkpoints").exists():
        raise InvalidInput(
            f"{run} holds a run already; continue it with --resume {run}, or choose another --out"
        )
    distributed.barrier()


def _prepare_folder(config: TrainingConfig, run: Path, resume: bool) -> None:
    """Remove what a kill left half saved, and write the resolved config."""
    sweep_partial(run)
    if not resume:  # a resumed run keeps the command and the machine that it was started with
        facts = circumstances(config.seed, config.train.init_from)
        replace_durably(run / _ENVIRONMENT, json.dumps(facts, indent=1).encode())
    crash_point("run-described")
    replace_durably(run / _CONFIG, dump(config).encode())


def _finish(config: TrainingConfig, state: RunState, run: Path) -> Path:
    """Write ``RUN/model`` and the curves."""
    if distributed.is_main():
        draw_curves(run)
        training = json.loads((run / _ENVIRONMENT).read_text())
        training |= {"steps": config.train.max_steps, "training_s": round(training_s(run))}
        with state.average.applied():
            save_model(adapters.merged(state.model), run / "model", card={"training": training})
            if state.base is not None:
                adapters.save_adapter(state.model, run / adapters.FOLDER)
    state.engine.close()
    distributed.barrier()
    return run / "model"


def _keep_best(
    config: TrainingConfig, model: VideoModel, run: Path, done: int, values: dict[str, float], best: float
) -> float:
    """Save ``RUN/best`` if this evaluation is better than all before; return the best value now."""
    value = values.get(f"val/{config.evaluation.best}", -math.inf)
    if value <= best:
        return best
    if distributed.is_main():
        save_model(
            adapters.merged(model),
            run / "best",
            card={"training": {"step": done, config.evaluation.best: value}},
        )
    return value


def _mean_over_processes(losses: dict[str, Tensor], signal_number: int) -> dict[str, float]:
    """Average the losses, and agree on the signal to stop for: all must stop after the same step."""
    # each counted by itself: a sum of numbers would be another signal
    stops = (signal.SIGINT, signal.SIGTERM)
    received = torch.tensor([signal_number == each for each in stops], device=losses["loss"].device)
    numbers = distributed.all_sum(torch.cat([torch.stack([*losses.values()]).double(), received.double()]))
    *means, interrupted, terminated = (numbers / distributed.world_size()).tolist()
    values = dict(zip(losses, means, strict=True))
    return values | {"stop": signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0}


def _report(
    tracker: Tracker | None, bar: Any, clock: _Clock, done: int, values: dict[str, float], every: int
) -> None:
    evaluated = any(name.startswith("val/") for name in values)
    if tracker is None:
        return
    if done % every == 0 or evaluated:
        tracker.metrics(done, **values)
        tracker.speed(done, **clock.lap())
        shown = {name.removeprefix("val/"): f"{value:.3g}" for name, value in values.items()}
        bar.set_postfix(shown, refresh=False)
        if evaluated:
            draw_curves(tracker.metrics_path.parent)
    bar.update()


def _bar(last: int, done: int) -> AbstractContextManager[Any]:
    """Return the progress bar; only process 0 shows one."""
    return progress_bar(last, "train", "step", initial=done) if distributed.is_main() else nullcontext()


@contextmanager
def _tracking(config: TrainingConfig, run: Path, done: int) -> Iterator[Tracker | None]:
    if not distributed.is_main():
        yield None
        return
    tracker = Tracker(run, done, open_boards(config.train.boards, run, done, to_dict(config)))
    try:
        yield tracker
    finally:
        tracker.close()


class _Signals:
    """Turns the first SIGINT or SIGTERM into a number to look at; a second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Clock:
    """How fast the updates are, and how much of their time is waiting for data; saving does not count."""

    def __init__(self) -> None:
        self._waited_s = self._paused_s = 0.0
        self._start = time.perf_counter()
        self._updates = self._clips = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def count(self, clips: int) -> None:
        """Count an update and its clips."""
        self._updates += 1
        self._clips += clips

    @contextmanager
    def pausing(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Return the figures since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused_s, 1e-9)
        figures = {
            "samples_per_s": self._clips / seconds,
            "step_s": seconds / max(self._updates, 1),
            "data_wait": self._waited_s / seconds,
        }
        self._waited_s = self._paused_s = 0.0
        self._start, self._updates, self._clips = now, 0, 0
        return figures
