"""From a config to its source of batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.training.classification.objective import LabelledBatch
from vlm.training.config import TrainingConfig
from vlm.training.sources.parts import in_parts
from vlm.types import Batch


def open_source(
    config: TrainingConfig, model: VideoModel, done: int, run: Path | None = None
) -> AbstractContextManager[Iterator[Batch] | Iterator[LabelledBatch]]:
    """Open the source that ``config.data`` names, or that of ``config.classification``.

    Args:
        config: The run's config.
        model: Decides preprocessing, tokenizer and device; texts have no tokens for one that reads none.
        done: Updates that are done.
        run: Folder for the list of rejected samples, ``rejected-RANK.jsonl``; None for no list.

    Returns:
        A context that yields an iterator over this process's share of the batches of the updates ``done``,
        ``done + 1``, ..., each ``train.accumulate`` parts one after the other, on the model's device; leaving
        it stops the workers.
    """
    if config.classification is not None:
        from vlm.training.classification.sources import open_labelled

        return open_labelled(in_parts(config), model, done * config.train.accumulate, run)
    if config.data.source == "world":
        from vlm.training.sources.world import open_world

        parts = config.train.accumulate
        return open_world(in_parts(config), model, done * parts, parts)
    if config.data.source == "reels":
        from vlm.training.reels.source import open_reels

        assert isinstance(model, VideoTextModel), "the config sees to it that claims are read"
        return open_reels(in_parts(config), model, done * config.train.accumulate)
    from vlm.training.sources.shards import open_shards

    return open_shards(config, model, done, run)
