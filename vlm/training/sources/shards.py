"""Batches of packed videos; true pairs are known across processes, exactly for clips of the digit world."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vlm import distributed
from vlm.data import ClipBatch, Loader, LoaderConfig, Mixture, ShardSource, true_pairs
from vlm.data.shards.remote import CacheConfig
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.training.config import TrainingConfig
from vlm.types import Batch, TokenBatch
from vlm.world import Scene, truth_matrix


class _Facts(NamedTuple):
    """What every process must know of a clip to say which captions are true of it."""

    key: str
    caption: str
    captions: tuple[str, ...]
    scene: str | None
    twin_key: str | None


@contextmanager
def open_shards(
    config: TrainingConfig, model: VideoModel, done: int, run: Path | None
) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over batches; see ``open_source``."""
    settings = config.data.shards
    cache = CacheConfig(
        folder=None if settings.cache is None else Path(settings.cache),
        max_bytes=round(settings.cache_gb * 1e9),
    )
    loader = Loader(
        Mixture([ShardSource(folder, cache=cache) for folder in settings.folders]),
        model.preprocessing,
        LoaderConfig(
            batch_size=config.train.batch_size,
            seed=config.seed,
            random_frames=settings.random_frames,
            augmentation=settings.augmentation,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            max_bad_fraction=settings.max_bad_fraction,
            fill=True,
        ),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        quarantine=None if run is None else run / f"rejected-{distributed.rank()}.jsonl",
    )
    batches = cast(Generator[ClipBatch, None, None], loader.batches(done * config.train.batch_size))
    with closing(batches) as clips:  # which stops the loader's threads
        yield (_to_batch(batch, loader, model, config.data.max_words) for batch in clips)


def _to_batch(clips: ClipBatch, loader: Loader, model: VideoModel, max_words: int) -> Batch:
    own = [_facts(clip.key, clip.caption, clip.captions, clip.metadata) for clip in clips.clips]
    parts = distributed.gather_objects((own, clips.rejected))
    for _, rejected in parts:  # all processes stop at the same batch once all of them found too many
        loader.note_rejected(rejected)
    everyone = [facts for part, _ in parts for facts in part]
    positives, siblings = relations(everyone)
    if isinstance(model, VideoTextModel):
        text = model.tokenize(list(clips.captions), max_words)
    else:
        text = TokenBatch(*torch.zeros(2, len(own), 0, dtype=torch.int64, device=model.device))
    return Batch(
        video=clips.video(model.device),
        text=text,
        positives=positives.to(model.device),
        siblings=siblings.to(model.device),
        offset=distributed.rank() * len(own),
        keys=clips.keys,
    )


def _facts(key: str, caption: str, captions: tuple[str, ...], metadata: Any) -> _Facts:
    scene = metadata.get("scene")
    return _Facts(
        key, caption, captions, None if scene is None else json.dumps(scene), metadata.get("twin_id")
    )


def relations(clips: list[_Facts]) -> tuple[Tensor, Tensor]:
    """Return (B, B) bool: which captions (columns) are true of which videos, and which clips are twins."""
    known = true_pairs(
        [clip.key for clip in clips], [clip.caption for clip in clips], [clip.captions for clip in clips]
    )
    if all(clip.scene is not None for clip in clips):
        scenes = [Scene.from_json(clip.scene or "") for clip in clips]
        known |= torch.from_numpy(truth_matrix(scenes, scenes).T)
    twins = [[one.key == other.twin_key for other in clips] for one in clips]
    return known, torch.tensor(twins, dtype=torch.bool)
