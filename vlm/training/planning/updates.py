"""The updates of a run by kind: those of one corpus are alike, and those of another cost something else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm.data.mixture import Turns
from vlm.training.config import TrainingConfig
from vlm.training.sources.config import PicturesConfig
from vlm.training.sources.shards import open_corpora

_PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateKind:
    """Updates that are alike.

    Attributes:
        corpus: Whose clips they see; empty where there are no corpora, ``pictures`` for those of the world.
        count: How many of the run are; None if that depends on shards that were not opened.
        batch_size: Clips of one, over all processes.
        num_frames: Of a clip.
    """

    corpus: str
    count: int | None
    batch_size: int
    num_frames: int


def update_kinds(config: TrainingConfig, *, opens: bool) -> list[UpdateKind]:
    """Return the kinds of a run's updates.

    Args:
        config: The run's.
        opens: Whether shards may be opened, to find out how many samples each corpus has.

    Raises:
        ConfigError, DataError, IntegrityError: The shards do not fit, or cannot be read.
    """
    run, num_frames = config.train, config.model.vision.num_frames
    if config.classification is not None or config.data.source != "shards":
        return _without_corpora(config)
    wanted = dict(sorted(config.data.shards.corpora.items()))
    counts: tuple[int | None, ...] = (run.max_steps,) if len(wanted) == 1 else (None,) * len(wanted)
    if opens:
        corpora = open_corpora(config.data.shards, run.accumulate)
        counts = Turns(corpora, run.batch_size, seed=config.seed).counts(run.max_steps)
    return [
        UpdateKind(
            corpus=name,
            count=count,
            batch_size=corpus.batch_size or run.batch_size,
            num_frames=1 if corpus.media == "image" else num_frames,
        )
        for (name, corpus), count in zip(wanted.items(), counts, strict=True)
    ]


def _without_corpora(config: TrainingConfig) -> list[UpdateKind]:
    run, data = config.train, config.data
    pictures = data.world.pictures
    count = 0
    if config.classification is None and data.source == "world" and pictures.every:
        count = run.max_steps // pictures.every
    kinds = [
        UpdateKind(
            corpus="",
            count=run.max_steps - count,
            batch_size=run.batch_size,
            num_frames=config.model.vision.num_frames,
        ),
        UpdateKind(
            corpus=_PICTURES, count=count, batch_size=pictures.batch_size or run.batch_size, num_frames=1
        ),
    ]
    return [kind for kind in kinds if kind.count]


def only(config: TrainingConfig, kind: UpdateKind) -> TrainingConfig:
    """Return a config all of whose updates are of that kind."""
    config = replace(config, train=replace(config.train, batch_size=kind.batch_size))
    if not kind.corpus or config.data.source == "world":
        pictures = PicturesConfig(every=1 if kind.corpus else 0)
        world = replace(config.data.world, pictures=pictures)
        return replace(config, data=replace(config.data, world=world))
    shards = config.data.shards
    corpus = replace(shards.corpora[kind.corpus], batch_size=None)
    return replace(config, data=replace(config.data, shards=replace(shards, corpora={kind.corpus: corpus})))
