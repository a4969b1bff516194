"""Evaluation in the course of training: retrieval of held-out clips of the digit world, or accuracy."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlm import distributed
from vlm.metrics import Positives, rank_scores
from vlm.metrics.twins import pair_positives, twin_scores
from vlm.models.classifier import Classifier
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.training.classification.validation import ClassificationValidation
from vlm.training.config import TrainingConfig
from vlm.training.reels.validation import ReelValidation
from vlm.training.sources.world import render_clip, to_input
from vlm.world import caption, gallery, truth_matrix

_ROWS_AT_ONCE = 32


class Evaluates(Protocol):
    """What the loop needs of an evaluation."""

    def run(self) -> dict[str, float]:
        """Return the model's metrics, the same in every process."""


def make_validation(config: TrainingConfig, model: VideoModel) -> Evaluates:
    """Return the evaluation for the kind of model that a config trains."""
    if isinstance(model, Classifier):
        return ClassificationValidation(config, model)
    assert isinstance(model, VideoTextModel), "a config without text has no evaluation"
    if config.data.source == "reels":
        return ReelValidation(config, model)
    return Validation(config, model)


class Validation:
    """A fixed twin gallery, rendered once and split over the processes.

    Args:
        config: The run's config.
        model: Evaluated as it is; decides the frames' size and normalisation.
    """

    def __init__(self, config: TrainingConfig, model: VideoTextModel) -> None:
        settings = config.evaluation
        self._model = model
        self._autocast = config.train.precision == "bf16"
        self.scenes = list(gallery("val", settings.seed, settings.clips, twins=True))
        size = len(self.scenes)
        share = -(-size // distributed.world_size())
        # the last processes repeat the last clip, so that all gather equally many
        own = [min(distributed.rank() * share + i, size - 1) for i in range(share)]
        self._frames = torch.stack([render_clip(self.scenes[i], model.preprocessing) for i in own])
        self._texts = [caption(self.scenes[i]) for i in own]
        self._truth = truth_matrix(self.scenes, self.scenes)

    def run(self) -> dict[str, float]:
        """Return recall of clips by caption: ``r1``, ``r5``, ``pair_r1`` and ``direction`` given the pair.

        Captions are queries, clips and twins the gallery. ``pair_r1`` counts the clip or its twin as found;
        ``direction`` is the share of captions that score their clip above its twin.
        """
        scores = self._scores().numpy()
        positives = Positives.from_matrix(self._truth)
        twin_of = np.arange(len(scores)) ^ 1
        recall = rank_scores(scores, positives)
        pair = rank_scores(scores, pair_positives(positives, twin_of))
        blocks = np.stack([scores[i : i + 2, i : i + 2] for i in range(0, len(scores), 2)])
        return {
            "r1": float(recall.recall(1).mean()),
            "r5": float(recall.recall(5).mean()),
            "pair_r1": float(pair.recall(1).mean()),
            "direction": float(twin_scores(blocks).direction.mean()),
        }

    @torch.inference_mode()
    def _scores(self) -> Tensor:
        """Return (captions, clips) inner products of all processes' clips, on the CPU."""
        was_training = self._model.training
        self._model.eval()
        videos, texts = [], []
        device = self._model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            for start in range(0, len(self._frames), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                video = to_input(self._frames[rows], self._model.preprocessing, device)
                videos.append(self._model.encode_video(video).embedding.float())
                texts.append(self._model.encode_text(self._texts[rows]).embedding.float())
        self._model.train(was_training)
        gathered = distributed.gather(torch.cat(videos)), distributed.gather(torch.cat(texts))
        video, text = (features[: len(self.scenes)].cpu() for features in gathered)
        return text @ video.T
