"""One update of a classifier: clips mixed in pairs, cross entropy against soft labels.

Every random choice is a pure function of (seed, step), and pairs lie next to each other in the global batch,
so the number of processes does not change what is learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlm import distributed
from vlm.models.classifier import Classifier
from vlm.training.classification.config import ClassificationConfig, MixingConfig
from vlm.training.objective import step_seed
from vlm.training.schedule import Curve, value_at
from vlm.training.teaching.distillation import Distillation

_MIXING = 5  # purpose of random numbers, beside seed and step


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledBatch:
    """This process's part of a global batch: ``video`` (b, t, 3, h, w) float32, ``labels`` (b,) int64."""

    video: Tensor
    labels: Tensor
    keys: tuple[str, ...] = ()


class Mix(NamedTuple):
    """How the clips of a batch are mixed in pairs.

    ``share`` is what a clip keeps; ``window`` (top, bottom, left, right) in pixels is what cutmix replaces;
    None fades the clips into each other.
    """

    share: float
    window: tuple[int, int, int, int] | None


def draw_mix(config: MixingConfig, size: int, rng: np.random.Generator) -> Mix:
    """Draw one mix for a batch of clips of ``size`` x ``size`` pixels.

    Source: Zhang et al. 2018, mixup; Yun et al. 2019, CutMix.
    """
    if not config.is_on or rng.random() >= config.probability:
        return Mix(1.0, None)
    cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.switch)
    alpha = config.cutmix if cut else config.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(share, None)
    side = int(size * np.sqrt(1 - share))
    y, x = (int(value) for value in rng.integers(size, size=2))
    top, bottom = max(y - side // 2, 0), min(y + side // 2, size)
    left, right = max(x - side // 2, 0), min(x + side // 2, size)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def partners(values: Tensor, repeats: int) -> Tensor:
    """Return the partner of each row: those of two neighbouring videos are exchanged, last one first.

    Args:
        values: (b, ...), the ``repeats`` clips of a video side by side.
        repeats: Clips of a video; b is a multiple of twice as many.
    """
    pairs = rearrange(values, "(p r) ... -> p r ...", r=2 * repeats)
    exchanged: Tensor = rearrange(pairs.flip(1), "p r ... -> (p r) ...")
    return exchanged


def mix_clips(video: Tensor, mix: Mix, repeats: int) -> Tensor:
    """Return the clips (b, t, 3, h, w), each mixed with its partner."""
    if mix.share == 1.0:
        return video
    others = partners(video, repeats)
    if mix.window is None:
        return torch.lerp(others, video, mix.share)
    top, bottom, left, right = mix.window
    mixed = video.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed


def soft_labels(labels: Tensor, num_classes: int, smoothing: float, mix: Mix, repeats: int) -> Tensor:
    """Return targets (b, classes) that sum to 1: smoothed, then mixed as the clips are."""
    targets = F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    if mix.share == 1.0:
        return targets
    return torch.lerp(partners(targets, repeats), targets, mix.share)


class ClassificationObjective(nn.Module):
    """Wraps a classifier so that an engine sees one call from batch to loss.

    Args:
        model: The classifier.
        config: Smoothing and mixing.
        seed: The run's seed.
        parts: Batches of an update.
        distillation: Knows a smaller encoder's tokens, if it is learned from as well.
        weight: Factor of that loss, a number or a curve over updates.
        autocast: Whether matrix products run in bf16 (weights stay fp32).
    """

    def __init__(
        self,
        model: Classifier,
        config: ClassificationConfig,
        *,
        seed: int,
        parts: int = 1,
        distillation: Distillation | None = None,
        weight: Curve = 0.0,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.seed = seed
        self.parts = parts
        self.distillation = distillation
        self.weight = weight
        self.autocast = autocast

    def forward(self, batch: LabelledBatch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this process's part of batch ``number``, and its terms, detached and unweighted.

        The teacher sees the clips as the student does, mixed.
        """
        torch.manual_seed(step_seed(self.seed, number, 1, distributed.rank()))  # drop path and dropout
        config, repeats = self.config, self.config.repeats
        rng = np.random.default_rng(step_seed(self.seed, number, _MIXING))
        mix = draw_mix(config.mixing, batch.video.shape[-1], rng)
        num_classes = self.model.config.num_classes
        targets = soft_labels(batch.labels, num_classes, config.label_smoothing, mix, repeats)
        with torch.autocast(batch.video.device.type, torch.bfloat16, enabled=self.autocast):
            video = mix_clips(batch.video, mix, repeats)
            tokens = self.model.vision_encoder(video).tokens
            loss = F.cross_entropy(self.model.classify(tokens), targets)
            terms = {"classification": loss.detach()}
            weight = value_at(self.weight, number // self.parts)
            if self.distillation is not None and weight > 0:
                lesson = self.distillation(video, tokens)
                terms["distillation"] = lesson.detach()
                loss = loss + weight * lesson
        return loss, terms
