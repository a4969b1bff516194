"""Floating-point operations of an update, counted while it runs, with those of our own operators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm.training.checkpoint import replace_durably
from vlm.training.config import TrainingConfig
from vlm.training.loop import build
from vlm.training.planning.updates import only, update_kinds
from vlm.training.setup import prepare_process
from vlm.training.sources.opening import open_source
from vlm.training.studies.config import StudyConfig

# per state and step: delta * A, its exponential, times h, delta * u * B in and C out (two each); the
# backward pass computes the states again and twice as much again
_SCAN, _SCAN_BACKWARD = 7, 21
_COUNTED = 4


def operations(study: StudyConfig, folder: Path) -> dict[str, float]:
    """Return the operations of a training of each arm; counted once and kept in the study's folder."""
    file = folder / "operations.json"
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if set(known) != set(study.arms):
        known = {arm: flops_of(study.training(arm, study.seeds[0], folder)) for arm in study.arms}
        folder.mkdir(parents=True, exist_ok=True)
        replace_durably(file, json.dumps(known, indent=1).encode())
    return known


def flops_of(stages: Sequence[TrainingConfig]) -> float:
    """Return the operations of an arm, forward and backward, teachers included; a multiply-add is two.

    Losses come and go in the course of a stage, so four updates of each kind, spread over it, are counted.
    The weights that a stage starts from do not matter to the count: random ones serve. Adapters are counted
    as if all learned.
    """
    return sum(
        _flops_per_update(only(stage, kind)) * kind.count
        for stage in stages
        for kind in update_kinds(stage, opens=True)
        if kind.count is not None
    )


def _flops_per_update(config: TrainingConfig) -> float:
    config = replace(config, train=replace(config.train, init_from=None, lora=None))
    device = prepare_process(config)
    with tempfile.TemporaryDirectory() as folder:
        state = build(config, Path(folder), device)
    counted = []
    for step in sorted(
        {(2 * part + 1) * config.train.max_steps // (2 * _COUNTED) for part in range(_COUNTED)}
    ):
        with open_source(config, state.model, step) as batches:
            parts = [next(batches) for _ in range(config.train.accumulate)]
            counter = FlopCounterMode(display=False, custom_mapping=_formulas())
            with counter:
                state.update(parts, step, 0)
            counted.append(counter.get_total_flops())
    return sum(counted) / len(counted)


def _formulas() -> dict[Any, Any]:
    ops = torch.ops.vlm
    return {
        ops.bi_scan: _scan,
        ops.bi_scan_backward: _scan_backward,
        ops.conv2: _convolution,
        ops.conv2_backward: _convolution_backward,
    }


def _scan(
    u: list[int], u_b: list[int] | None, _z: Any, _df: Any, _db: Any, _bf: Any, _bb: Any, A: list[int],
    *_rest: Any, **_named: Any,
) -> int:  # fmt: skip
    batch, length, channels = u
    return _SCAN * batch * length * channels * A[1] * (1 if u_b is None else 2)


def _scan_backward(_dout: Any, *arguments: Any, **named: Any) -> int:
    return _scan(*arguments, **named) * _SCAN_BACKWARD // _SCAN


def _convolution(
    x: list[int], weight: list[int], _bias: Any, weight_b: list[int] | None, *_rest: Any, **_named: Any
) -> int:
    batch, length, channels = x
    return 2 * weight[-1] * batch * length * channels * (1 if weight_b is None else 2)


def _convolution_backward(_du_f: Any, _du_b: Any, *arguments: Any, **named: Any) -> int:
    return 2 * _convolution(*arguments, **named)
