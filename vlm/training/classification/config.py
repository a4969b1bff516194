"""What the ``classification`` section of a training YAML decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlm.data.annotations.labels import LabelLayout
from vlm.data.augmentation import AugmentationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    """Mixing of the clips of a batch in pairs, with their labels; one draw a batch, as published.

    Attributes:
        mixup: Parameter of the beta distribution that shares are drawn from when clips are faded into each
            other; 0 = never.
        cutmix: The same when a window is pasted, through all frames; 0 = never.
        probability: Chance that a batch is mixed at all.
        switch: Chance that it is cutmix, where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError("classification.mixing: mixup and cutmix must not be negative")
        if not (0 <= self.probability <= 1 and 0 <= self.switch <= 1):
            raise ValueError("classification.mixing: probability and switch must be in [0, 1]")

    @property
    def is_on(self) -> bool:
        """Whether any batch is mixed."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledFilesConfig:
    """Video files and a file that says their labels, or shards that were packed with labels.

    Attributes:
        train: What to learn from: a file of labels, see ``vlm.data.annotations.labels``; a folder with a
            folder of videos a class; or shards, a path or a URL.
        val: The same to evaluate with; None for no evaluation.
        train_part: Part of ``train`` that is meant, where it holds several (COIN: ``training``).
        val_part: Part of ``val``.
        videos: Folder that the names in a file of labels are relative to.
        layout: How the labels are written; ``auto`` goes by the file's content.
        classes: File with the names of the classes, whose order numbers them; None takes them from ``train``.
        sampling: ``segments``: one frame of each equal span of the whole video; ``dense``: every
            ``stride``-th frame of one stretch.
        stride: Frames between two, if ``dense``.
        augmentation: Random changes of the pictures; None for none.
        repeats: Clips of a batch that are made of one video, each with random changes of its own.
        max_bad_fraction: Share of unreadable videos at which the run stops.
    """

    train: str = ""
    val: str | None = None
    train_part: str | None = None
    val_part: str | None = None
    videos: str = ""
    layout: LabelLayout = "auto"
    classes: str | None = None
    sampling: Literal["segments", "dense"] = "segments"
    stride: int = 4
    augmentation: AugmentationConfig | None = None
    repeats: int = 1
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.stride < 1:
            raise ValueError("classification.files: repeats and stride must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledWorldConfig:
    """Clips of the digit world in which one thing happens, or one is to be seen, rendered in memory.

    Attributes:
        label: ``direction``: where something moves; ``action``: what happens, see ``vlm.world.ACTIONS``;
            ``digit``: what is there, which one frame (``model.vision.num_frames: 1``) tells as well.
        split: Which split's digits and combinations are used.
    """

    label: Literal["direction", "action", "digit"] = "direction"
    split: Literal["train", "val", "test", "combo"] = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """A classifier is trained; ``tokenizer``, ``model.text`` and ``data.source`` play no part then.

    Of ``losses`` only ``distillation`` does: a smaller model, trained before, whose tokens are learned too.

    Attributes:
        source: ``world`` renders clips in memory; ``files`` decodes videos, loose or packed.
        world: Settings of the world source.
        files: Settings of the files source.
        head: ``new``: the head starts at random; ``keep``: that of ``train.init_from``.
        reads: What the head reads: the class token (``cls``, as published), or the ``mean`` of the others.
        dropout: Rate in front of the head.
        label_smoothing: Share of the target that is spread evenly over all classes.
        mixing: Mixing of clips in pairs.
    """

    source: Literal["world", "files"] = "world"
    world: LabelledWorldConfig = field(default_factory=LabelledWorldConfig)
    files: LabelledFilesConfig = field(default_factory=LabelledFilesConfig)
    head: Literal["new", "keep"] = "new"
    reads: Literal["cls", "mean"] = "cls"
    dropout: float = 0.0
    label_smoothing: float = 0.1
    mixing: MixingConfig = field(default_factory=MixingConfig)

    def __post_init__(self) -> None:
        if self.source == "files" and not self.files.train:
            raise ValueError("classification.files.train is needed where classification.source is 'files'")
        if not (0 <= self.dropout < 1 and 0 <= self.label_smoothing < 1):
            raise ValueError("classification: dropout and label_smoothing must be in [0, 1)")

    @property
    def repeats(self) -> int:
        """Clips of a batch that are made of one video."""
        return self.files.repeats if self.source == "files" else 1

    @property
    def can_evaluate(self) -> bool:
        """Whether there is something to evaluate with."""
        return self.source == "world" or self.files.val is not None
