"""From a config to a classifier: its classes, and where its weights come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm import distributed
from vlm.data.annotations.labels import read_classes as read_names
from vlm.data.annotations.labels import read_labelled
from vlm.data.augmentation import names_side
from vlm.data.shards.layout import MANIFEST
from vlm.data.shards.remote import is_remote
from vlm.data.sources import LabelledShards, LabelledVideos, ShardSource
from vlm.errors import ConfigError
from vlm.models.classifier import Classifier, ClassifierConfig
from vlm.models.video_mamba import VideoMambaConfig
from vlm.models.video_model import VideoModel
from vlm.training.classification.config import ClassificationConfig, LabelledFilesConfig
from vlm.training.classification.objective import ClassificationObjective
from vlm.training.objective import step_seed
from vlm.training.teaching.distillation import make_distillation
from vlm.types import Preprocessing
from vlm.world import ACTIONS

if TYPE_CHECKING:
    from vlm.training.config import TrainingConfig


def open_set(files: LabelledFilesConfig, which: str) -> LabelledVideos | LabelledShards:
    """Open the videos to learn from (``train``) or to evaluate with (``val``), by the same classes.

    Raises:
        ConfigError: The names of videos have no folder to start from.
        DataError: The labels cannot be read, or a class to evaluate is none of those that are learned.
    """
    classes = None if files.classes is None else read_names(files.classes)
    train = _open_labelled(files, files.train, files.train_part, classes)
    if which == "train":
        return train
    assert files.val is not None
    return _open_labelled(files, files.val, files.val_part, train.classes)


def _open_labelled(
    files: LabelledFilesConfig, path: str, part: str | None, classes: tuple[str, ...] | None
) -> LabelledVideos | LabelledShards:
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        return LabelledShards(ShardSource(path), classes)
    if not files.videos and not Path(path).is_dir():
        raise ConfigError(f"classification.files.videos is needed: {path} names videos by file")
    return LabelledVideos(read_labelled(path, files.videos, layout=files.layout, part=part, classes=classes))


def read_classes(config: ClassificationConfig) -> tuple[str, ...]:
    """Return the names of the classes to learn.

    Raises:
        ConfigError: Clips would be mirrored although a class names a side.
        DataError: The labels cannot be read.
    """
    if config.source == "world":
        return ACTIONS[config.world.label]
    classes = open_set(config.files, "train").classes
    augmentation = config.files.augmentation
    sided = next((name for name in classes if names_side(name)), None)
    if sided is not None and augmentation is not None and augmentation.flip > 0:
        raise ConfigError(
            f"classification.files.augmentation.flip is {augmentation.flip}, but mirrored clips of the class "
            f"{sided!r} would be labelled wrongly; set it to 0"
        )
    return classes


def make_classifier(
    config: ClassificationConfig,
    vision: VideoMambaConfig,
    start: VideoModel | None,
    *,
    seed: int,
    name: str,
    domain: str,
) -> Classifier:
    """Return a classifier on the CPU, with random weights but for a head that is kept.

    Args:
        config: Its classes and head.
        vision: Sizes of its encoder.
        start: The model that its encoder's weights will come from; its statistics of colours are taken over.
        seed: Of the random weights.
        name: The model's short name.
        domain: What it knows.

    Raises:
        ConfigError: The head is to be kept and ``start`` has none for these classes.
    """
    classes = read_classes(config)
    torch.manual_seed(step_seed(seed, 0, 0))
    model = Classifier(
        ClassifierConfig(
            vision=dataclasses.replace(vision, pool_norm=False, alignment_width=0),
            num_classes=len(classes),
            reads=config.reads,
            dropout=config.dropout,
            class_names=() if classes == tuple(map(str, range(len(classes)))) else classes,
        ),
        preprocessing=dataclasses.replace(
            Preprocessing() if start is None else start.preprocessing,
            num_frames=vision.num_frames,
            image_size=vision.image_size,
            resize="bilinear",
            keep_aspect=True,
        ),
        name=name,
        domain=domain,
    )
    if config.head == "keep":
        _keep_head(model, start)
    return model


def _keep_head(model: Classifier, start: VideoModel | None) -> None:
    names, size = model.config.class_names, model.config.num_classes
    if not isinstance(start, Classifier) or start.config.num_classes != size:
        got = f"one of {start.config.num_classes}" if isinstance(start, Classifier) else "none"
        raise ConfigError(
            f"classification.head is 'keep': expected train.init_from to be a classifier of {size} "
            f"classes, got {got}; set it to 'new'"
        )
    if start.config.class_names and names and start.config.class_names != names:
        raise ConfigError(
            "classification.head is 'keep', but train.init_from has other classes, or in another order"
        )
    model.head.load_state_dict(start.head.state_dict())


def make_objective(
    config: TrainingConfig, settings: ClassificationConfig, model: Classifier
) -> ClassificationObjective:
    """Wrap a classifier with its loss, and that of a smaller encoder's tokens if it is distilled.

    Raises:
        ConfigError: Repeats or pairs do not fit into a process's part of the batch.
        InvalidInput: The encoder to learn from does not exist, or does not fit.
    """
    own = config.train.batch_size // config.train.accumulate // distributed.world_size()
    unit = settings.repeats * (2 if settings.mixing.is_on else 1)
    if own % unit:
        raise ConfigError(
            f"train.batch_size gives each process {own} clips, expected a multiple of {unit}: "
            f"{settings.repeats} repeats of a video"
            + (", videos mixed in pairs" if settings.mixing.is_on else "")
        )
    vision = model.vision_encoder.config
    torch.manual_seed(step_seed(config.seed, 0, 1))
    return ClassificationObjective(
        model,
        settings,
        seed=config.seed,
        parts=config.train.accumulate,
        distillation=make_distillation(config.losses.distillation, vision, model.preprocessing, model.device),
        weight=config.losses.distillation.weight,
        autocast=config.train.precision == "bf16",
    )
