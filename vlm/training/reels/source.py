"""Batches of reels with claims about each, rendered in memory; they follow from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm import distributed
from vlm.data.preprocessing import fit
from vlm.models.video_text_model import VideoTextModel
from vlm.training.config import TrainingConfig
from vlm.training.reels.config import ReelsConfig
from vlm.training.schedule import value_at
from vlm.training.sources.world import open_rendered, to_input, tokenizer_of
from vlm.types import Batch, Preprocessing, TokenBatch
from vlm.world.chapters.claims import AskedReel, claims_of, stream, truth_of
from vlm.world.chapters.reels import Reel, render_reel, sample_reels


class RawReels(NamedTuple):
    """A batch as it travels between processes: ``frames`` (b, t, 3, h, w) uint8, the rest as in ``Batch``."""

    frames: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    positives: Tensor
    keys: tuple[str, ...]


@contextmanager
def open_reels(config: TrainingConfig, model: VideoTextModel, done: int) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over this process's part of the batches from ``done`` on; see ``open_source``."""
    dataset = ReelBatches(
        config.data.reels,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        preprocessing=model.preprocessing,
        tokenizer=model.tokenizer.to_json(),
        max_words=config.data.max_words,
    )
    offset = distributed.rank() * config.train.batch_size // distributed.world_size()
    with open_rendered(dataset, config, done) as raws:
        yield (to_batch(raw, model, offset) for raw in raws)


class ReelBatches(Dataset[RawReels]):
    """Reels and claims; item ``step`` is this process's part of batch ``step``.

    Args:
        config: What reels are like.
        seed: Of the stream of reels.
        batch_size: Reels of the global batch.
        rank: This process.
        world_size: Number of processes; divides the batch.
        preprocessing: Frames and size of the clips.
        tokenizer: Content of a ``tokenizer.json``.
        max_words: Longest claim in tokens.
    """

    def __init__(
        self,
        config: ReelsConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        preprocessing: Preprocessing,
        tokenizer: str,
        max_words: int,
    ) -> None:
        self._config, self._seed, self._batch_size = config, seed, batch_size
        share = batch_size // world_size
        self._own = slice(rank * share, (rank + 1) * share)
        self._preprocessing = preprocessing
        self._tokenizer, self._max_words = tokenizer, max_words

    def __getitem__(self, step: int) -> RawReels:
        """Return this process's part of batch ``step``; ``positives`` is that of all parts."""
        config, size = self._config, self._batch_size
        num_scenes = round(value_at(config.num_scenes, step))
        asked = [ask(config, self._seed, step * size + place, num_scenes) for place in range(size)]
        own = asked[self._own]
        tokens = tokenizer_of(self._tokenizer)(
            [text for item in own for pair in item.pairs for text in pair.texts], max_tokens=self._max_words
        )
        return RawReels(
            frames=torch.stack([self._drawn(item.reel) for item in own]),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            positives=torch.from_numpy(truth_of(asked)),
            keys=tuple(item.reel.reel_id for item in own),
        )

    def _drawn(self, reel: Reel) -> Tensor:
        frames = render_reel(reel, self._preprocessing.num_frames)
        return fit(frames, self._preprocessing).contiguous()


def ask(config: ReelsConfig, seed: int, number: int, num_scenes: int) -> AskedReel:
    """Return reel ``number`` of a run and the claims about it."""
    couple = sample_reels(config.split, seed, number // 2, num_scenes)
    reel, other = couple[number % 2], couple[1 - number % 2]
    return AskedReel(reel, claims_of(reel, other, config.pairs, stream(config.split, seed, number)))


def to_batch(raw: RawReels, model: VideoTextModel, offset: int) -> Batch:
    """Bring a batch to the model's device, normalised."""
    device = model.device
    return Batch(
        video=to_input(raw.frames, model.preprocessing, device),
        text=TokenBatch(raw.input_ids.to(device), raw.attention_mask.to(device)),
        positives=raw.positives.to(device),
        offset=offset,
        keys=raw.keys,
        claims=len(raw.input_ids) // len(raw.frames),
    )
