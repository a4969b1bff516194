"""Batches of packed videos or pictures; true pairs are known across processes, exactly in the digit world."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vlm import distributed
from vlm.data import Clip, ClipBatch, Corpus, Loader, LoaderConfig, Mixture, ShardSource, true_pairs
from vlm.data.collate import identify
from vlm.data.shards.remote import CacheConfig
from vlm.errors import ConfigError
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.training.config import TrainingConfig
from vlm.training.sources.config import ShardsConfig
from vlm.training.sources.parts import check_shares
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
    """Yield an iterator over batches; see ``open_source``.

    Raises:
        ConfigError: A corpus does not fit: its batch, its media, or samples that another has too.
        DataError: A corpus is empty, or its shards cannot be read.
    """
    loader = make_loader(config, model, run)
    batches = cast(Generator[ClipBatch, None, None], loader.batches(done * config.train.accumulate))
    with closing(batches) as clips:  # which stops the loader's threads
        yield (to_batch(batch, loader, model, config.data.max_words) for batch in clips)


def make_loader(config: TrainingConfig, model: VideoModel, run: Path | None = None) -> Loader:
    """Return the loader of this process's clips; see ``open_shards``."""
    return Loader(
        open_corpora(config.data.shards, config.train.accumulate),
        model.preprocessing,
        loading(config),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        quarantine=None if run is None else run / f"rejected-{distributed.rank()}.jsonl",
    )


def loading(config: TrainingConfig) -> LoaderConfig:
    """Return how samples become batches."""
    settings = config.data.shards
    return LoaderConfig(
        batch_size=config.train.batch_size,
        parts=config.train.accumulate,
        seed=config.seed,
        random_frames=settings.random_frames,
        augmentation=settings.augmentation,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        max_bad_fraction=settings.max_bad_fraction,
        fill=True,
    )


def open_corpora(settings: ShardsConfig, parts: int = 1) -> list[Corpus]:
    """Return the corpora of a run by the order of their names, checked against their shards.

    Args:
        settings: Folders and batches.
        parts: Of a batch, each of which all processes share.

    Raises:
        ConfigError: A batch does not divide by the processes, a folder holds other media than it is said to,
            or two folders hold the same samples.
        DataError, IntegrityError: A folder's manifest cannot be read.
    """
    cache = CacheConfig(
        folder=None if settings.cache is None else Path(settings.cache),
        max_bytes=round(settings.cache_gb * 1e9),
    )
    corpora, seen = [], dict[str, str]()
    for name, wanted in sorted(settings.corpora.items()):
        key = f"data.shards.corpora.{name}"
        if wanted.batch_size is not None:
            check_shares(f"{key}.batch_size", wanted.batch_size, parts)
        sources = [ShardSource(folder, cache=cache) for folder in wanted.folders]
        for folder, source in zip(wanted.folders, sources, strict=True):
            if source.media != wanted.media:
                raise ConfigError(f"{key}: {folder} holds media: {source.media}, not media: {wanted.media}")
            other = seen.setdefault(source.fingerprint, f"{folder} of corpus {name}")
            if other != f"{folder} of corpus {name}" or wanted.folders.count(folder) > 1:
                raise ConfigError(
                    f"{key}: {folder} holds the samples of {other} again; name it once, and weigh a corpus "
                    "with its weight"
                )
        corpora.append(
            Corpus(
                source=Mixture(sources),
                name=name,
                media=wanted.media,
                batch_size=wanted.batch_size,
                weight=wanted.weight,
                templates=wanted.templates,
            )
        )
    return corpora


def to_batch(clips: ClipBatch, loader: Loader, model: VideoModel, max_words: int) -> Batch:
    """Settle accounts with the other processes, and put a batch with its texts and truth on the device.

    Raises:
        DataError: Too many samples were rejected, by all processes.
        IntegrityError: A sample came twice in a pass, or not at all.
    """
    own = [_facts(clip) for clip in clips.clips]
    parts = distributed.gather_objects((own, clips.report))
    loader.settle([report for _, report in parts])
    everyone = [facts for part, _ in parts for facts in part]
    positives, siblings = relations(everyone)
    if isinstance(model, VideoTextModel):
        text = model.tokenize(list(clips.texts), max_words)
    else:
        text = TokenBatch(*torch.zeros(2, len(own), 0, dtype=torch.int64, device=model.device))
    return Batch(
        video=clips.video(model.device),
        text=text,
        positives=positives.to(model.device),
        siblings=siblings.to(model.device),
        offset=distributed.rank() * len(own),
        keys=clips.keys,
        corpus=clips.corpus if len(loader.tallies) > 1 else "",
    )


def _facts(clip: Clip) -> _Facts:
    scene, twin = clip.metadata.get("scene"), clip.metadata.get("twin_id")
    return _Facts(
        key=clip.identity,
        caption=clip.caption,
        captions=clip.captions,
        scene=None if scene is None else json.dumps(scene),
        twin_key=None if twin is None else identify(clip.origin, twin),
    )


def relations(clips: list[_Facts]) -> tuple[Tensor, Tensor]:
    """Return (B, B) bool: which captions (columns) are true of which videos, and which clips are twins."""
    known = true_pairs(
        [clip.key for clip in clips], [clip.caption for clip in clips], [clip.captions for clip in clips]
    )
    if all(clip.scene is not None for clip in clips):
        scenes = [Scene.from_json(clip.scene or "") for clip in clips]
        known |= torch.from_numpy(truth_matrix(scenes, scenes).T)
    twins = torch.zeros(len(clips), len(clips), dtype=torch.bool)
    places: dict[str, list[int]] = {}
    for place, clip in enumerate(clips):
        places.setdefault(clip.key, []).append(place)
    for place, clip in enumerate(clips):
        if clip.twin_key in places:
            twins[places[clip.twin_key], place] = True
    return known, twins
