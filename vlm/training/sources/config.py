"""What the ``data`` section of a training YAML decides."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from vlm.data.augmentation import AugmentationConfig
from vlm.data.shards.layout import Media
from vlm.training.reels.config import ReelsConfig
from vlm.training.schedule import Curve, check_curve


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturesConfig:
    """Single pictures of one thing, with its name as caption, in updates of their own between those of clips.

    A clip is told from others by colours and motions long before its digits matter; a picture is not.

    Attributes:
        every: The last of every so many updates is one; 0 = none, 1 = all.
        batch_size: Pictures of one, over all processes; None for ``train.batch_size``.
    """

    every: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.every < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError("data.world.pictures: every must not be negative, batch_size at least 1")

    def are_in(self, update: int) -> bool:
        """Whether update ``update``, from 0, is of pictures."""
        return self.every > 0 and (update + 1) % self.every == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """Clips of the digit world, rendered in memory.

    Attributes:
        split: Which split's digits, combinations and templates are used.
        grouped: Share of the batch that comes in minimal-pair groups; a number or a curve over steps.
        group_size: Clips of a group: a scene with its reversed twin and variants that differ in one thing.
        twins: Share of the groups that contain the scene's reversed twin, where it has one.
        recasts: Share of the groups that contain the scene's motions done by other things.
        pictures: Updates of pictures in between.
        shuffle_frames: Show each clip's frames in random order: a control that cannot learn from motion.
    """

    split: Literal["train", "val", "test", "combo"] = "train"
    grouped: Curve = 0.5
    group_size: int = 4
    twins: float = 1.0
    recasts: float = 0.0
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    shuffle_frames: bool = False

    def __post_init__(self) -> None:
        check_curve("data.world.grouped", self.grouped)
        if self.group_size < 2 or not (0 <= self.twins <= 1 and 0 <= self.recasts <= 1):
            raise ValueError("data.world.group_size must be at least 2, twins and recasts in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Packed videos, or packed pictures, that share no batch with those of another corpus.

    Attributes:
        folders: Folders made by ``vlm data pack`` or ``vlm data index``, paths or URLs (``http(s)://``,
            ``s3://``, ``gs://``); all their samples are gone through once before any comes again.
        media: ``video``, or ``image``: pictures, which the model sees as one frame without a time.
        weight: How often the corpus is gone through while one of weight 1 is gone through once.
        batch_size: Clips of an update with this corpus, over all processes; None for ``train.batch_size``.
        templates: Wordings of the captions, such as ``a photo of {}.``; one at random at each visit.
    """

    folders: tuple[str, ...] = ()
    media: Media = "video"
    weight: float = 1.0
    batch_size: int | None = None
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("folders must name at least one folder of shards")
        if not 0 < self.weight < math.inf or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError("weight must be finite and above 0, batch_size at least 1")
        if not all(template.count("{}") == 1 for template in self.templates):
            raise ValueError(f"templates must each hold one {{}}, got {list(self.templates)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsConfig:
    """Packed videos and pictures.

    Attributes:
        corpora: Name → shards. Each update sees clips of one corpus; they take turns in a random order, so
            often that an epoch of all is one of each whose weight is 1.
        random_frames: A random frame of each span instead of the middle one; off for the digit world, whose
            clips are judged by their middles.
        augmentation: Random changes of the pictures; None for none. Clips of which a caption names a side
            are never mirrored.
        max_bad_fraction: Share of unreadable samples of a corpus at which the run stops.
        cache: Folder for shards fetched from URLs; None for one in the user's folder.
        cache_gb: What the fetched shards may take together; those unused for longest go first.
    """

    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    random_frames: bool = True
    augmentation: AugmentationConfig | None = None
    max_bad_fraction: float = 0.01
    cache: str | None = None
    cache_gb: float = 64.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1 or self.cache_gb <= 0:
            raise ValueError(
                "data.shards.max_bad_fraction must be in [0, 1] and data.shards.cache_gb above 0, got "
                f"{self.max_bad_fraction} and {self.cache_gb}"
            )
        for name in self.corpora:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"data.shards.corpora: expected names of letters and digits, got {name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where clips and captions come from.

    Attributes:
        source: ``world`` renders clips in memory; ``reels`` renders many short scenes in a row, with claims
            about them for the contrastive and the matching loss; ``shards`` reads packed videos.
        world: Settings of the world source.
        reels: Settings of the reels source.
        shards: Settings of the shards source.
        workers: Processes (world) or threads (shards) that prepare batches; 0 = the training process does.
        prefetch: Batches that are kept ready, for each worker of the world source.
        max_words: Longest caption in tokens; longer ones are cut.
    """

    source: Literal["world", "reels", "shards"] = "world"
    world: WorldConfig = field(default_factory=WorldConfig)
    reels: ReelsConfig = field(default_factory=ReelsConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    workers: int = 1
    prefetch: int = 4
    max_words: int = 64

    @property
    def has_pictures(self) -> bool:
        """Whether some updates are of single pictures."""
        if self.source == "shards":
            return any(corpus.media == "image" for corpus in self.shards.corpora.values())
        return self.source == "world" and self.world.pictures.every > 0

    def __post_init__(self) -> None:
        if self.source == "shards" and not self.shards.corpora:
            raise ValueError("data.shards.corpora must name at least one when data.source is 'shards'")
        if self.workers < 0 or self.prefetch < 1 or self.max_words < 4:
            raise ValueError("data.workers must not be negative, prefetch at least 1, max_words at least 4")
