"""How much memory a process of a run needs: what it keeps all the time, and what a pass forward keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlm import distributed
from vlm.models.classifier import Classifier
from vlm.models.video_model import VideoModel
from vlm.training.classification.objective import LabelledBatch
from vlm.training.config import TrainingConfig
from vlm.training.schedule import is_ever_positive, value_at
from vlm.training.sources.pictures import PICTURE_WORDS
from vlm.types import Batch, TokenBatch
from vlm.world.captions import MAX_WORDS

_FP32 = 4  # bytes
_MOMENTS = 2  # AdamW's averages
_MARKS = 2  # tokens around a text


def made_up_batch(
    config: TrainingConfig, model: VideoModel, clips: int, num_frames: int | None = None
) -> Batch | LabelledBatch:
    """Return noise of the shape that training data have; texts are as long as they may be.

    ``clips`` are those of each process; ``num_frames`` is that of the model unless given.
    """
    vision: Any = model.config.vision
    shape = (clips, num_frames or vision.num_frames, vision.channels, vision.image_size, vision.image_size)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(shape, generator=generator).to(model.device)
    if isinstance(model, Classifier):
        labels = torch.arange(clips) % model.config.num_classes
        return LabelledBatch(video=video, labels=labels.to(model.device))
    words = _longest_text(config, shape[1]) if config.losses.use_text else 0
    if words:
        words = min(words, model.config.text.max_positions)
    ids = torch.full((clips, words), 4, device=model.device)  # behind the special ones
    total = clips * distributed.world_size()
    same = torch.eye(total, dtype=torch.bool, device=model.device)
    groups = _groups(config, total).to(model.device)
    return Batch(
        video=video,
        text=TokenBatch(ids, torch.ones_like(ids)),
        positives=same,
        siblings=groups[:, None] == groups[None],
        offset=distributed.rank() * clips,
    )


def _longest_text(config: TrainingConfig, num_frames: int) -> int:
    """Return the tokens of the longest text that a source may give."""
    if config.data.source != "world":
        return config.data.max_words
    # a model of one frame sees whole captions
    words = PICTURE_WORDS if num_frames < config.model.vision.num_frames else MAX_WORDS
    return min(config.data.max_words, words + _MARKS)


def _groups(config: TrainingConfig, clips: int) -> Tensor:
    """Return the minimal-pair group of each clip (clips,) int64: as many in groups as there ever are."""
    size, share = config.losses.matching.num_siblings + 1, 1.0
    if config.data.source == "world":
        grouped, size = config.data.world.grouped, min(size, config.data.world.group_size)
        share = grouped if isinstance(grouped, float) else max(value for _, value in grouped)
    numbers = torch.arange(clips)
    inside = min(math.ceil(share * clips / size) * size, clips)
    return torch.where(numbers < inside, numbers // size, clips + numbers)


def fewest_clips(config: TrainingConfig) -> int:
    """Return how many clips it takes until each of them has all negatives that it has in a large batch."""
    matching = config.losses.matching
    if config.classification is not None or not is_ever_positive(matching.weight):
        return 1
    return max(matching.num_negatives + 1, 4 if matching.num_siblings else 1)


def telling_steps(config: TrainingConfig) -> list[int]:
    """Return a step of a run for each set of losses that are above zero together."""
    if config.classification is not None:
        return [0]
    last, curves = config.train.max_steps - 1, config.losses.weights
    ends = [point for curve in curves if not isinstance(curve, float) for point, _ in curve]
    # a loss begins or ends at a point of its curve, or right beside it
    near = {round(end) + beside for end in ends for beside in (-1, 0, 1)}
    steps = sorted({0, last, *(step for step in near if 0 <= step <= last)})
    found: dict[tuple[bool, ...], int] = {}
    for step in steps:
        found.setdefault(tuple(value_at(curve, step) > 0 for curve in curves), step)
    return list(found.values())


def kept_bytes(module: nn.Module, batch: Any, number: int = 0) -> int:
    """Return how much a pass forward keeps for the one backward, besides weights and the batch's video."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    known.add(batch.video.untyped_storage().data_ptr())
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = module(batch, number)
    total = sum(kept.values())
    del loss  # until now it held what was counted, so that no address was given out twice
    return total


def memory_megabytes(
    config: TrainingConfig,
    module: nn.Module,
    *,
    kept: float,
    frames: int,
    processes: int,
    teachers_mb: float,
) -> dict[str, float]:
    """Return what one process needs, by part and in total, in 10^6 bytes.

    The total is the sum, and thus above the true peak, where gradients come as activations go.

    Args:
        config: Decides the engine and the moving average.
        module: The model with its losses.
        kept: Bytes that a pass forward of this process's part of a batch keeps.
        frames: Of the largest batch, over all processes.
        processes: Over which the engine may split.
        teachers_mb: Size of frozen teachers.
    """
    learning = _FP32 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    everything = _FP32 * sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    stage, plain = config.engine.zero_stage, config.engine.name == "plain"
    gradients: float = learning / (processes if stage == 2 else 1)
    if plain and processes > 1:
        gradients *= 2  # they travel in one piece, which is a copy
    optimizer: float = _MOMENTS * learning
    if stage:
        optimizer = (_MOMENTS + 1) * learning / processes  # and a copy of the weights
    vision = config.model.vision
    video = _FP32 * frames // processes * vision.channels * vision.image_size**2
    parts = {
        "weights": everything,
        "gradients": gradients,
        "optimizer": 0 if config.engine.offload else optimizer,
        "moving_average": learning if config.optimizer.ema_decay else 0,
        "teachers": teachers_mb * 1e6,
        "batch": video,
        "activations": kept,
    }
    rounded = {name: round(value / 1e6, 1) for name, value in parts.items()}
    return {**rounded, "total": round(sum(parts.values()) / 1e6, 1)}
