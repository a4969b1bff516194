"""What a run needs and costs, found out by building it and timing some updates; nothing is written."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from vlm import distributed
from vlm.config import to_dict
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.text import Tokenizer, build_tokenizer
from vlm.training.config import EngineConfig, TrainingConfig
from vlm.training.loop import RunState, build
from vlm.training.planning.files import NeededFile, may_open_shards, needed_files
from vlm.training.planning.memory import (
    fewest_clips,
    kept_bytes,
    made_up_batch,
    memory_megabytes,
    telling_steps,
)
from vlm.training.planning.updates import UpdateKind, only, update_kinds
from vlm.training.setup import make_model, make_objective, make_tokenizer, prepare_process
from vlm.training.sources.opening import open_source
from vlm.world import vocabulary

_BYTES = 4  # of a weight
_FEW_CLIPS = 8  # of a process, in the first timing
_PATIENCE_S = 20.0  # for timing a whole part of an update


def estimate(config: TrainingConfig) -> dict[str, Any]:
    """Return what a run reads, its sizes and its costs.

    Of a run whose files are not all here, what can be known without them is told, with random weights of the
    config's sizes. ``updates`` lists the kinds of them, one for each corpus. ``hours`` are those of training
    alone: updates or the preparation of their data, whichever takes longer, or both where no workers prepare
    them, at the speed of the slower of two updates, the first and one in mid-run, on this machine and with
    the plain engine. A batch that would take long is timed in part and its time scaled.
    """
    device = prepare_process(config)
    files = needed_files(config)
    missing = [file.key for file in files if not file.present]
    kinds = update_kinds(config, opens=may_open_shards(files))
    clips = [kind.batch_size * kind.count for kind in kinds if kind.count is not None]
    report: dict[str, Any] = {
        "config": to_dict(config),
        "files": [asdict(file) for file in files],
        "missing": missing,
        "steps": config.train.max_steps,
        "clips": sum(clips) if len(clips) == len(kinds) else None,
        "updates": [asdict(kind) for kind in kinds],
        "processes": distributed.world_size(),
    }
    if {"classification.files.train", "classification.files.classes"} & set(missing):
        return report | {"not_measured": f"anything: the classes are unknown without {missing[0]}"}
    known = _without(config, missing)
    state: RunState | None = None
    module: nn.Module | None
    if missing:
        model = make_model(known, _tokenizer(known, missing), device)
        teaches = not any(key.endswith(".teacher") for key in missing)
        module = make_objective(known, model) if teaches else None
    else:
        with tempfile.TemporaryDirectory() as folder:
            state = build(known, Path(folder), device)
        model, module = state.model, state.module
    config, known = (_as_built(each, model) for each in (config, known))
    kinds = [
        kind if kind.num_frames == 1 else replace(kind, num_frames=model.preprocessing.num_frames)
        for kind in kinds
    ]
    report |= _sizes(config, model) | {"updates": [asdict(kind) for kind in kinds]}
    if module is not None:
        report["memory_megabytes"] = memory_megabytes(
            config,
            module,
            kept=max(_kept_by_part(known, module, model, kind) for kind in kinds),
            frames=max(kind.batch_size * kind.num_frames for kind in kinds),
            processes=distributed.world_size(),
            teachers_mb=_teachers(files),
        )
    if state is not None:
        times = [_times(config, state, kind) for kind in kinds]
        updates = [asdict(kind) | found for kind, found in zip(kinds, times, strict=True)]
        return report | {"updates": updates, "hours": _three_digits(sum(found["hours"] for found in times))}
    return report | {"hours": None, "not_measured": f"time: not here are {', '.join(missing)}"}


def _as_built(config: TrainingConfig, model: VideoModel) -> TrainingConfig:
    """Return the config with the sizes of the model, which are its own if it is one to start from."""
    if isinstance(model, VideoTextModel):
        return replace(config, model=model.config)
    text = replace(config.model.text, vision_width=model.config.vision.width)
    return replace(config, model=replace(config.model, vision=model.config.vision, text=text))


def _without(config: TrainingConfig, missing: list[str]) -> TrainingConfig:
    """Return the config with the plain engine, and without the weights that are not here."""
    run = config.train
    if "train.init_from" in missing:
        run = replace(run, init_from=None, lora=None)
        if config.classification is not None:
            config = replace(config, classification=replace(config.classification, head="new"))
    if "train.text_from" in missing:
        run = replace(run, text_from=None)
    return replace(config, train=run, engine=EngineConfig())


def _tokenizer(config: TrainingConfig, missing: list[str]) -> Tokenizer | None:
    """Return the run's tokenizer, or any that lets the model be built."""
    return build_tokenizer(vocabulary()) if "tokenizer" in missing else make_tokenizer(config)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _teachers(files: list[NeededFile]) -> float:
    return sum(file.megabytes or 0.0 for file in files if file.key.endswith(".teacher"))


def _sizes(config: TrainingConfig, model: VideoModel) -> dict[str, Any]:
    """Return counts of weights and what they take on the disk."""
    vision: Any = config.model.vision
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = model.num_parameters
    adapted = config.train.lora is not None
    states = 3 + (1 if config.optimizer.ema_decay else 0)  # the weight, AdamW's averages, the moving average
    frozen_in_state = 0 if adapted else everything - learning
    model_bytes = _BYTES * everything
    checkpoint = _BYTES * (states * learning + frozen_in_state) + (
        _BYTES * learning if adapted else model_bytes
    )
    models = 2 if config.evaluation.every else 1  # the last, and the best
    whole = (config.checkpoint.keep + 1) * checkpoint + models * model_bytes
    return {
        "parameters": everything,
        "learning_parameters": learning,
        "frozen_parameters": everything - learning,
        "parameters_by_part": {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in model.named_children()
        },
        "tokens_per_clip": vision.num_steps * vision.grid**2 + 1,
        "checkpoint_megabytes": round(checkpoint / 1e6, 1),
        "disk_megabytes": round(whole / 1e6, 1),  # with one checkpoint in the making
        "disk_free_megabytes": round(shutil.disk_usage(Path.cwd()).free / 1e6),
    }


def _unit(config: TrainingConfig) -> int:
    """Return the fewest clips that a process can be given."""
    settings = config.classification
    return 1 if settings is None else settings.repeats * (2 if settings.mixing.is_on else 1)


def _kept_by_part(config: TrainingConfig, module: nn.Module, model: VideoModel, kind: UpdateKind) -> float:
    """Return the most bytes that a process's part of an update keeps, a straight line through two small ones.

    Losses come and go, so a step with each set of them is tried.
    """
    own = kind.batch_size // config.train.accumulate // distributed.world_size()
    unit = _unit(config)
    few = min(unit * math.ceil(fewest_clips(config) / unit), own)

    def kept(clips: int, step: int) -> float:
        batch = made_up_batch(config, model, clips, kind.num_frames)
        return kept_bytes(module, batch, step * config.train.accumulate)

    most = 0.0
    for step in telling_steps(config):
        if own <= 2 * few:
            most = max(most, kept(own, step))
        else:
            first = kept(few, step)
            most = max(most, first + (kept(2 * few, step) - first) / few * (own - few))
    return most


def _times(config: TrainingConfig, state: RunState, kind: UpdateKind) -> dict[str, Any]:
    assert kind.count is not None
    config = only(config, kind)
    parts, processes = config.train.accumulate, distributed.world_size()
    whole = config.train.batch_size // parts
    unit = _unit(config) * processes
    few = min(whole, max(unit, _FEW_CLIPS * processes // unit * unit))
    clips = few
    seconds, data_s = _timed(config, state, few)
    if few < whole and max(seconds) * whole / few < _PATIENCE_S:
        clips = whole
        seconds, data_s = _timed(config, state, whole)
    steps = [value * whole / clips * parts for value in seconds]
    data_s *= whole / clips * parts / max(1, config.data.workers)
    # without workers the training process prepares a batch, then learns from it
    slowest = max(*steps, data_s) if config.data.workers else max(steps) + data_s
    return {
        "timed_clips": clips,
        "step_seconds": [_three_digits(value) for value in steps],
        "data_seconds": _three_digits(data_s),
        "clips_per_second": _three_digits(config.train.batch_size / slowest),
        "hours": _three_digits(slowest * kind.count / 3600),
    }


def _timed(config: TrainingConfig, state: RunState, clips: int) -> tuple[list[float], float]:
    """Return the seconds of a part of ``clips`` at the run's start and middle, and of making one."""
    parts = config.train.accumulate
    source = replace(
        config,
        train=replace(config.train, batch_size=clips * parts),
        data=replace(config.data, workers=0),
    )
    seconds, making = [], []
    for step in (0, config.train.max_steps // 2):
        number = step * parts
        with open_source(source, state.model, step) as batches:
            begin = time.perf_counter()
            batch = next(batches)
            making.append(time.perf_counter() - begin)
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            loss, _ = state.engine.losses(batch, number)
            state.engine.differentiate(loss)
            state.engine.update(0.0)
            passed = time.perf_counter() - begin
        seconds.append(passed)
    return seconds, max(making)
