"""Evaluation in the course of training: claims about held-out reels, a true one against a false one."""

from __future__ import annotations

import numpy as np
import torch

from vlm import distributed
from vlm.evaluation.pairs.reels import judge
from vlm.models.video_text_model import VideoTextModel
from vlm.training.config import TrainingConfig
from vlm.world.chapters.claims import KINDS, asked_groups

_PAIRS = 8


class ReelValidation:
    """Fixed reels of held-out writers, the same in every run that is to be compared.

    Args:
        config: The run's config.
        model: Evaluated as it is; every process evaluates a share of the reels.
    """

    def __init__(self, config: TrainingConfig, model: VideoTextModel) -> None:
        settings = config.evaluation
        self._model = model
        self._autocast = config.train.precision == "bf16"
        asked = [
            item for group in asked_groups("val", settings.seed, settings.clips, _PAIRS) for item in group
        ]
        self._own = asked[distributed.rank() :: distributed.world_size()]

    def run(self) -> dict[str, float]:
        """Return the share of pairs in which the true claim scores higher: ``presence`` and ``order``."""
        was_training = self._model.training
        self._model.eval()
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._autocast):
            hits = judge(self._model, self._own, report=False)
        self._model.train(was_training)
        kinds = np.array([[pair.kind for pair in item.pairs] for item in self._own])
        sums = torch.tensor([[hits[kinds == kind].sum(), (kinds == kind).sum()] for kind in KINDS])
        right, asked = distributed.all_sum(sums.double().to(self._model.device)).unbind(1)
        return dict(zip(KINDS, (right / asked).tolist(), strict=True))
