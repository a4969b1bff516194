"""Batches of labelled clips, of the digit world or of video files; they follow from (seed, step) alone."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm import distributed
from vlm.data import ClipBatch, Loader, LoaderConfig
from vlm.errors import ConfigError
from vlm.models.video_model import VideoModel
from vlm.training.classification.config import ClassificationConfig, LabelledWorldConfig
from vlm.training.classification.objective import LabelledBatch
from vlm.training.classification.setup import open_set
from vlm.training.sources.world import ignore_signals, render_clip, to_input
from vlm.types import Preprocessing
from vlm.world import ACTIONS, Scene, action, sample_scene

if TYPE_CHECKING:
    from vlm.training.config import TrainingConfig

_TRIES = 64  # scenes that belong to one place of a batch: nearly always one of them fits


@contextmanager
def open_labelled(
    config: TrainingConfig, model: VideoModel, done: int, run: Path | None
) -> Iterator[Iterator[LabelledBatch]]:
    """Yield an iterator over this process's part of the batches from ``done`` on; see ``open_source``."""
    assert config.classification is not None
    if config.classification.source == "world":
        with _open_world(config, config.classification.world, model, done) as rendered:
            yield rendered
        return
    loader = make_loader(config, config.classification, model.preprocessing, "train", run)
    batches = cast(Generator[ClipBatch, None, None], loader.batches(done))
    with closing(batches) as clips:  # which stops the loader's threads
        yield (_to_batch(batch, loader, model.device) for batch in clips)


def make_loader(
    config: TrainingConfig,
    settings: ClassificationConfig,
    preprocessing: Preprocessing,
    which: str,
    run: Path | None = None,
) -> Loader:
    """Return the loader of the videos to learn from (``train``) or, in order and unchanged, ``val``.

    Raises:
        ConfigError: There are pictures, and the model wants videos.
        DataError: The labels cannot be read.
    """
    files, learning = settings.files, which == "train"
    name = f"rejected-{distributed.rank()}.jsonl"
    source = open_set(files, which)
    if source.media == "image" and preprocessing.num_frames > 1:
        raise ConfigError(
            f"classification.files.{which} holds pictures; set model.vision.num_frames to 1 to learn of them"
        )
    return Loader(
        source,
        preprocessing,
        LoaderConfig(
            batch_size=config.train.batch_size // settings.repeats,
            seed=config.seed,
            shuffle=learning,
            random_frames=learning,
            random_caption=False,
            stride=files.stride if files.sampling == "dense" else 0,
            augmentation=files.augmentation if learning else None,
            repeats=files.repeats if learning else 1,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            max_bad_fraction=files.max_bad_fraction,
            fill=learning,
        ),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        quarantine=None if run is None else run / name,
    )


def _to_batch(clips: ClipBatch, loader: Loader, device: torch.device) -> LabelledBatch:
    for rejected in distributed.gather_objects(clips.rejected):
        loader.note_rejected(rejected)
    return LabelledBatch(video=clips.video(device), labels=labels_of(clips, device), keys=clips.keys)


def labels_of(clips: ClipBatch, device: torch.device | str = "cpu") -> Tensor:
    """Return the numbers of the clips' classes, (b,) int64."""
    return torch.tensor([clip.metadata["label"] for clip in clips.clips], dtype=torch.int64, device=device)


class RawLabelled(NamedTuple):
    """A batch as it travels between processes: ``frames`` (b, t, 3, h, w) uint8, ``labels`` (b,)."""

    frames: Tensor
    labels: Tensor
    keys: tuple[str, ...]


class LabelledWorld(Dataset[RawLabelled]):
    """Clips of the digit world with a class each; item ``step`` is this process's part of batch ``step``.

    Args:
        config: Split and what is a class.
        seed: Of the stream of scenes.
        batch_size: Clips of the global batch.
        rank: This process.
        world_size: Number of processes; divides the batch.
        preprocessing: Frames and size of the clips.
    """

    def __init__(
        self,
        config: LabelledWorldConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        preprocessing: Preprocessing,
    ) -> None:
        self._config, self._seed, self._batch_size = config, seed, batch_size
        share = batch_size // world_size
        self._own = range(rank * share, (rank + 1) * share)
        self._preprocessing = preprocessing

    def __getitem__(self, step: int) -> RawLabelled:
        """Return this process's part of batch ``step``."""
        config = self._config
        first = step * self._batch_size
        scenes = [labelled_scene(config, self._seed, first + place) for place in self._own]
        return RawLabelled(
            frames=torch.stack([render_clip(scene, self._preprocessing) for scene, _ in scenes]),
            labels=torch.tensor([label for _, label in scenes]),
            keys=tuple(scene.clip_id for scene, _ in scenes),
        )


def labelled_scene(config: LabelledWorldConfig, seed: int, number: int) -> tuple[Scene, int]:
    """Return the scene of a number in a stream, the first of many that has a class; and its class."""
    for index in itertools.count(number * _TRIES):
        scene = sample_scene(config.split, seed, index)
        name = action(scene, config.label)
        if name is not None:
            return scene, ACTIONS[config.label].index(name)
    raise AssertionError("the stream of scenes has no end")


@contextmanager
def _open_world(
    config: TrainingConfig, settings: LabelledWorldConfig, model: VideoModel, done: int
) -> Iterator[Iterator[LabelledBatch]]:
    workers = config.data.workers
    loader = DataLoader(
        LabelledWorld(
            settings,
            seed=config.seed,
            batch_size=config.train.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            preprocessing=model.preprocessing,
        ),
        batch_size=None,
        sampler=range(done, config.train.max_steps),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=config.data.prefetch if workers else None,
        worker_init_fn=ignore_signals,
    )
    iterator = iter(loader)
    device = model.device
    try:
        yield (
            LabelledBatch(
                video=to_input(raw.frames, model.preprocessing, device),
                labels=raw.labels.to(device),
                keys=raw.keys,
            )
            for raw in iterator
        )
    finally:
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
