"""What a run would cost, found out by building it and timing two updates; nothing is written."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from vlm import distributed
from vlm.training.config import TrainingConfig, in_parts
from vlm.training.loop import build
from vlm.training.setup import prepare_process
from vlm.training.sources import open_source

_BYTES_PER_WEIGHT = 4
_STATES_PER_WEIGHT = 3  # the weight and AdamW's two averages


def estimate(config: TrainingConfig) -> dict[str, Any]:
    """Return counts and costs of a run.

    The updates timed are the first and the one in the middle of the run, whose losses and batch composition
    may differ; ``hours`` goes by the slower. The weights that they change are thrown away.
    """
    device = prepare_process(config)
    with tempfile.TemporaryDirectory() as folder:
        state = build(config, Path(folder), device)
    vision = config.model.vision
    middle = config.train.max_steps // 2
    seconds = []
    for step in (0, middle):
        with open_source(in_parts(config), state.model, step * config.train.accumulate) as batches:
            parts = [next(batches) for _ in range(config.train.accumulate)]
            begin = time.perf_counter()
            state.update(parts, step, 0)
            seconds.append(time.perf_counter() - begin)
    learning = [parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad]
    averages = sum(learning) if config.optimizer.ema_decay else 0
    saved = _BYTES_PER_WEIGHT * (
        _STATES_PER_WEIGHT * sum(learning) + 2 * averages + state.model.num_parameters
    )
    return {
        "parameters": state.model.num_parameters,
        "learning_parameters": sum(learning),
        "parameters_by_part": {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in state.model.named_children()
        },
        "tokens_per_clip": vision.num_steps * vision.grid**2 + 1,
        "clips": config.train.max_steps * config.train.batch_size,
        "steps": config.train.max_steps,
        "processes": distributed.world_size(),
        "step_seconds": [round(value, 3) for value in seconds],
        "clips_per_second": round(config.train.batch_size / max(seconds), 1),
        "hours": round(max(seconds) * config.train.max_steps / 3600, 3),
        "checkpoint_megabytes": round(saved / 1e6, 1),
    }
