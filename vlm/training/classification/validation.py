"""Accuracy in the course of training: one view of each held-out clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlm import distributed
from vlm.errors import DataError
from vlm.metrics.classification import class_accuracy, top_hits
from vlm.models.classifier import Classifier
from vlm.training.classification.config import LabelledWorldConfig
from vlm.training.classification.sources import LabelledWorld, RawLabelled, labels_of, make_loader
from vlm.training.sources.world import to_input

if TYPE_CHECKING:
    from vlm.training.config import TrainingConfig

_ROWS_AT_ONCE = 32


class ClassificationValidation:
    """Held-out clips, split over the processes: rendered once in the world, decoded anew from files.

    Args:
        config: The run's config.
        model: Evaluated as it is.
    """

    def __init__(self, config: TrainingConfig, model: Classifier) -> None:
        assert config.classification is not None
        self._config, self._model = config, model
        self._settings = config.classification
        self._autocast = config.train.precision == "bf16"
        self._rendered: list[RawLabelled] = []
        if self._settings.source == "world":
            world = LabelledWorld(
                LabelledWorldConfig(label=self._settings.world.label, split="val"),
                seed=config.evaluation.seed,
                batch_size=1,
                rank=0,
                world_size=1,
                preprocessing=model.preprocessing,
            )
            own = range(distributed.rank(), config.evaluation.clips, distributed.world_size())
            self._rendered = [world[clip] for clip in own]

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """Return ``top1``, ``top5`` and ``mean_class``, the mean over the classes of their ``top1``.

        Raises:
            DataError: Too many videos cannot be read.
        """
        was_training = self._model.training
        self._model.eval()
        device = self._model.device
        scores, labels = [], []
        problem: DataError | None = None
        try:
            for video, numbers in self._clips():
                with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
                    scores.append(self._model(video).float().cpu().numpy())
                labels.append(numbers.numpy())
        except DataError as error:
            problem = error
        self._model.train(was_training)
        parts = distributed.gather_objects((scores, labels, problem))
        for _, _, failed in parts:  # no process may wait for one that failed
            if failed is not None:
                raise failed
        score = np.concatenate([rows for part, _, _ in parts for rows in part])
        label = np.concatenate([rows for _, part, _ in parts for rows in part])
        hits = top_hits(score, label, 1)
        return {
            "top1": float(hits.mean()),
            "top5": float(top_hits(score, label, min(5, score.shape[1])).mean()),
            "mean_class": float(class_accuracy(hits, label).mean()),
        }

    def _clips(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's clips, normalised and on the device, and their classes."""
        device = self._model.device
        if self._settings.source == "world":
            for start in range(0, len(self._rendered), _ROWS_AT_ONCE):
                rows = self._rendered[start : start + _ROWS_AT_ONCE]
                frames = torch.cat([row.frames for row in rows])
                labels = torch.cat([row.labels for row in rows])
                yield to_input(frames, self._model.preprocessing, device), labels
            return
        loader = make_loader(self._config, self._settings, self._model.preprocessing, "val")
        for batch in loader.batches(num_epochs=1):
            if batch.clips:
                yield batch.video(device), labels_of(batch)
