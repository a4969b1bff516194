"""Numbers that change in the course of a run, the learning rate among them, and which parameters decay."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

# what is never decayed besides vectors and scalars: state-space dynamics and lookup tables
_UNDECAYED = ("A_log", "A_b_log", "embeddings.weight", "pos_embed", "temporal_pos_embedding", "cls_token")
# what makes tokens of pixels, below the encoder's first block; and its blocks
_EMBEDDING = re.compile(
    r"(^|\.)vision_encoder\.(patch_embed\.|cls_token$|pos_embed$|temporal_pos_embedding$)"
)
_BLOCK = re.compile(r"(^|\.)vision_encoder\.layers\.(\d+)\.")


Curve: TypeAlias = float | tuple[tuple[float, float], ...]


def check_curve(name: str, curve: Curve) -> None:
    """Raise ValueError unless ``curve`` is a number, or (step, value) points in ascending steps."""
    if isinstance(curve, float):
        return
    steps = [step for step, _ in curve]
    if not curve or any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(
            f"{name} must be a number or a list of [step, value] in ascending steps, got {curve}"
        )


def value_at(curve: Curve, step: int) -> float:
    """Return the value of ``curve`` at ``step``: linear between its points, constant outside them."""
    if isinstance(curve, float):
        return curve
    first, last = curve[0], curve[-1]
    if step <= first[0]:
        return first[1]
    for (start, low), (end, high) in zip(curve, curve[1:], strict=False):
        if step <= end:
            return low + (high - low) * (step - start) / (end - start)
    return last[1]


def is_ever_positive(curve: Curve) -> bool:
    """Return whether ``curve`` is above zero at some step."""
    return curve > 0 if isinstance(curve, float) else any(value > 0 for _, value in curve)


def first_without(curves: Sequence[Curve], max_steps: int) -> int | None:
    """Return the first step below ``max_steps`` at which no curve is above zero, None if there is none."""
    candidates = {0}  # else it is one at which a curve falls to zero
    for curve in curves:
        points = () if isinstance(curve, float) else curve
        for (start, low), (end, high) in zip(points, points[1:], strict=False):
            if low > 0 >= high:
                crossing = math.floor(start + (end - start) * low / (low - high))
                candidates |= {crossing, crossing + 1}
    for step in sorted(candidates):
        if 0 <= step < max_steps and all(value_at(curve, step) <= 0 for curve in curves):
            return step
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine decay.

    Attributes:
        learning_rate: Peak, reached after the warm-up.
        final_ratio: Learning rate at the end of the decay, as a part of the peak.
        warmup_steps: Steps of linear rise; step 0 already moves by peak / warmup_steps.
        decay_steps: Step at which the decay ends; ``train.max_steps`` if None. A fixed number lets a run that
            is stopped early repeat the first steps of a long one.
        betas: Decay rates of AdamW's averages.
        epsilon: AdamW's divisor guard.
        weight_decay: Decoupled decay of matrices; vectors, A_log, D and lookup tables are never decayed.
        clip_norm: Largest global gradient norm; 0 = no clipping.
        layer_decay: The video encoder's last block learns at this part of the rate, each block before it at
            this part of the next one's, the embeddings slowest of all; 1 = all alike.
        ema_decay: Decay of the moving average of the weights that is evaluated and saved; 0 = none.
    """

    learning_rate: float = 5e-4
    final_ratio: float = 0.01
    warmup_steps: int = 100
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    layer_decay: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.warmup_steps < 0 or self.clip_norm < 0:
            raise ValueError("learning_rate must be above 0, warmup_steps and clip_norm not negative")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.final_ratio <= 1:
            raise ValueError("ema_decay must be in [0, 1) and final_ratio in [0, 1]")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")


def learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """Return the rate of ``step`` (from 0): linear warm-up, then half a cosine down to the final ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    end = config.decay_steps if config.decay_steps is not None else max_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    low = config.final_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Return whether weight decay applies: matrices and kernels, but no tables and no scan dynamics."""
    return parameter.ndim > 1 and not any(name.endswith(suffix) for suffix in _UNDECAYED)


def layer_of(name: str, depth: int) -> int:
    """Return where a parameter stands: 0 the embeddings, i + 1 block i, depth + 1 all that follows.

    Args:
        name: Of a parameter of a model, or of a module around it.
        depth: Blocks of the video encoder.
    """
    if _EMBEDDING.search(name):
        return 0
    block = _BLOCK.search(name)
    return depth + 1 if block is None else int(block[2]) + 1


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Split the learning parameters by weight decay and by the part of the learning rate that they get.

    Returns:
        Groups for an optimiser, each with its ``weight_decay`` and ``rate_factor``, the lowest layer first,
        and in the module's order inside a group.

    Source: Clark et al. 2020, ELECTRA, section 3.1 (layer-wise decay of the learning rate).
    """
    named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
    blocks = (_BLOCK.search(name) for name, _ in module.named_parameters())
    depth = max((int(block[2]) + 1 for block in blocks if block is not None), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        layer = layer_of(name, depth) if layer_decay < 1 else depth + 1
        decayed = is_decayed(name, parameter)
        empty = {
            "params": [],
            "weight_decay": weight_decay if decayed else 0.0,
            "rate_factor": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, not decayed), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its part of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)  # a state saved before there were parts has none


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the module's learning parameters; the fused form, 8 times faster on a CPU."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay, config.layer_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )
