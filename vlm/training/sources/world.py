"""Batches of the digit world, rendered in memory by worker processes, with minimal pairs side by side."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm import distributed
from vlm.data.preprocessing import resize
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.text import Tokenizer
from vlm.training.config import TrainingConfig
from vlm.training.schedule import value_at
from vlm.training.sources.config import WorldConfig
from vlm.training.sources.pictures import draw_picture
from vlm.types import Batch, Preprocessing, TokenBatch
from vlm.world import (
    Scene,
    caption,
    facts,
    has_twin,
    recast,
    render,
    sample_frames,
    sample_scene,
    truth_matrix,
    twin,
    variants,
)

_COMPOSITION, _WORDING, _ORDER, _PICTURES = 11, 12, 13, 14  # purposes of random streams, beside seed and step


class RawBatch(NamedTuple):
    """A batch as it travels between processes: ``frames`` (b, t, 3, h, w) uint8, the rest as in ``Batch``."""

    frames: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    positives: Tensor
    siblings: Tensor
    keys: tuple[str, ...]


@contextmanager
def open_world(
    config: TrainingConfig, model: VideoModel, done: int, parts: int = 1
) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over batches, ``parts`` of them an update; see ``open_source``.

    Workers are spawned, and stopped on leaving.
    """
    dataset = WorldBatches(
        config.data.world,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        preprocessing=model.preprocessing,
        tokenizer=model.tokenizer.to_json() if isinstance(model, VideoTextModel) else None,
        max_words=config.data.max_words,
        parts=parts,
    )
    with open_rendered(dataset, config, done) as raws:
        yield (to_batch(raw, model, distributed.rank()) for raw in raws)


@contextmanager
def open_rendered(dataset: Dataset[Any], config: TrainingConfig, done: int) -> Iterator[Iterator[Any]]:
    """Yield an iterator over a dataset's items from ``done`` on, made by the workers that a config wants."""
    workers = config.data.workers
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(done, config.train.max_steps),
        num_workers=workers,
        multiprocessing_context="spawn"
        if workers
        else None,  # a forked process must not run a model's threads
        prefetch_factor=config.data.prefetch if workers else None,
        worker_init_fn=ignore_signals,
    )
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


class WorldBatches(Dataset[RawBatch]):
    """Batches of the digit world, rendered in memory; item ``step`` is this process's part of batch ``step``.

    Args:
        config: Split and composition.
        seed: Of the stream of scenes.
        batch_size: Clips of the global batch.
        rank: This process.
        world_size: Number of processes; divides the batch.
        preprocessing: Frames and size of the clips.
        tokenizer: Content of a ``tokenizer.json``; None for texts without tokens.
        max_words: Longest caption in tokens.
        parts: Batches of an update.
    """

    def __init__(
        self,
        config: WorldConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        preprocessing: Preprocessing,
        tokenizer: str | None,
        max_words: int,
        parts: int = 1,
    ) -> None:
        self._config = config
        self._seed = seed
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._max_words = max_words
        self._parts = parts

    def __getitem__(self, step: int) -> RawBatch:
        """Return this process's part of batch ``step``; the text is as long as the global batch's longest."""
        return (
            self._pictures(step) if self._config.pictures.are_in(step // self._parts) else self._clips(step)
        )

    def _clips(self, step: int) -> RawBatch:
        scenes, groups = compose(self._config, self._seed, step, self._batch_size)
        rng = _stream(self._seed, step, _WORDING)
        texts = [caption(scene, rng=rng) for scene in scenes]
        tokens = self._tokens(texts)
        truth = truth_matrix(scenes, scenes).T  # rows are videos here
        window = self._window(len(scenes))
        own = scenes[window]
        clips = [render_clip(scene, self._preprocessing) for scene in own]
        if self._config.shuffle_frames:
            orders = [_stream(self._seed, step, _ORDER, place) for place in range(len(scenes))][window]
            clips = [clip[order.permutation(len(clip))] for clip, order in zip(clips, orders, strict=True)]
        return RawBatch(
            frames=torch.stack(clips),
            input_ids=tokens.input_ids[window],
            attention_mask=tokens.attention_mask[window],
            positives=torch.from_numpy(np.ascontiguousarray(truth)),
            siblings=torch.from_numpy(groups[:, None] == groups[None]),
            keys=tuple(scene.clip_id for scene in own),
        )

    def _pictures(self, step: int) -> RawBatch:
        size = self._config.pictures.batch_size or self._batch_size
        rng = _stream(self._seed, step, _PICTURES)
        numbers = range(step * size, (step + 1) * size)
        drawn = [draw_picture(self._config.split, self._seed, number, rng) for number in numbers]
        tokens = self._tokens([picture.caption for picture in drawn])
        window = self._window(size)
        own = drawn[window]
        return RawBatch(
            frames=torch.stack([render_clip(it.scene, self._preprocessing, [it.frame]) for it in own]),
            input_ids=tokens.input_ids[window],
            attention_mask=tokens.attention_mask[window],
            positives=torch.tensor([[one.name == other.name for other in drawn] for one in drawn]),
            siblings=torch.eye(size, dtype=torch.bool),
            keys=tuple(picture.scene.clip_id for picture in own),
        )

    def _window(self, size: int) -> slice:
        share = size // self._world_size
        return slice(self._rank * share, (self._rank + 1) * share)

    def _tokens(self, texts: list[str]) -> TokenBatch:
        if self._tokenizer is None:
            return TokenBatch(*torch.zeros(2, len(texts), 0, dtype=torch.int64))
        return tokenizer_of(self._tokenizer)(texts, max_tokens=self._max_words)


def compose(
    config: WorldConfig, seed: int, step: int, batch_size: int
) -> tuple[list[Scene], npt.NDArray[np.int64]]:
    """Choose the scenes of batch ``step``: minimal-pair groups first, then single scenes.

    Returns:
        The scenes, and each one's group (batch_size,) int64; singles have groups of their own.
    """
    rng = _stream(seed, step, _COMPOSITION)
    num_groups = int(value_at(config.grouped, step) * batch_size / config.group_size)
    scenes: list[Scene] = []
    groups: list[int] = []
    for place in range(batch_size):
        if len(scenes) >= batch_size:
            break
        first = sample_scene(config.split, seed, step * batch_size + place)
        members = [first] if place >= num_groups else _group(first, config, rng)
        scenes.extend(members)
        groups.extend([place] * len(members))
    return scenes[:batch_size], np.array(groups[:batch_size], dtype=np.int64)


def _group(scene: Scene, config: WorldConfig, rng: np.random.Generator) -> list[Scene]:
    """Return a scene, its twin, recast and variants, each saying something else, up to the group's size."""
    members = [scene]
    if has_twin(scene) and rng.random() < config.twins:
        members.append(twin(scene))
    if len(members) < config.group_size and rng.random() < config.recasts:
        other = recast(scene, rng)
        members.extend([] if other is None else [other])
    changed = list(variants(scene, rng).values())
    order = rng.permutation(len(changed))
    said = {facts(member) for member in members}
    for place in order:
        if len(members) == config.group_size:
            break
        other = changed[place]
        if facts(other) not in said:  # turning a single movement round says what the reversed twin says
            members.append(other)
            said.add(facts(other))
    return members


def render_clip(scene: Scene, preprocessing: Preprocessing, shown: Sequence[int] | None = None) -> Tensor:
    """Return frames of a scene, (t, 3, s, s) uint8, resized but not yet normalised.

    Args:
        scene: What to render.
        preprocessing: Number and size of the frames.
        shown: Which frames, if not those that are sampled.
    """
    chosen = sample_frames(preprocessing.num_frames) if shown is None else shown
    frames = torch.from_numpy(render(scene, chosen))
    size = preprocessing.image_size
    images = rearrange(frames, "t h w c -> t c h w")
    return resize(
        images, size, size, kernel=preprocessing.resize, antialias=preprocessing.antialias
    ).contiguous()


def to_input(frames: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Normalise (..., 3, h, w) uint8 frames on the device: the last step of ``vlm.data.preprocess``."""
    mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1)
    return frames.to(device).to(torch.float32).div_(255).sub_(mean).div_(std)


def to_batch(raw: RawBatch, model: VideoModel, rank: int) -> Batch:
    """Bring a batch to the model's device, normalised."""
    device = model.device
    return Batch(
        video=to_input(raw.frames, model.preprocessing, device),
        text=TokenBatch(raw.input_ids.to(device), raw.attention_mask.to(device)),
        positives=raw.positives.to(device),
        siblings=raw.siblings.to(device),
        offset=rank * len(raw.frames),
        keys=raw.keys,
    )


def _stream(*counters: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counters)))


@lru_cache(maxsize=2)
def tokenizer_of(text: str) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json``'s content; the last ones are kept."""
    return Tokenizer.from_json(text)


def ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and termination to the training process, which saves and then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
