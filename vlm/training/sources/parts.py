"""An update's batch is computed in parts, and each part by all processes: how a batch divides."""

from __future__ import annotations

from dataclasses import replace

from vlm import distributed
from vlm.errors import ConfigError
from vlm.training.config import TrainingConfig
from vlm.training.objective import LossesConfig
from vlm.training.schedule import Curve


def in_parts(config: TrainingConfig) -> TrainingConfig:
    """Return a config in which every part of an update is a batch of its own.

    Batch ``update * accumulate + part`` of that config is a part of ``update``; clips come in the same order.
    Corpora are not divided: their turns go by updates, and so do those of the digit world's pictures.

    Raises:
        ConfigError: Its pictures do not divide by the parts and the processes.
    """
    parts, pictures = config.train.accumulate, config.data.world.pictures
    if pictures.every and pictures.batch_size is not None:
        check_shares("data.world.pictures.batch_size", pictures.batch_size, parts)
        pictures = replace(pictures, batch_size=pictures.batch_size // parts)
    if parts == 1:
        return config
    grouped = _stretched(config.data.world.grouped, parts)
    world = replace(config.data.world, grouped=grouped, pictures=pictures)
    reels = replace(config.data.reels, num_scenes=_stretched(config.data.reels.num_scenes, parts))
    run = replace(
        config.train,
        batch_size=config.train.batch_size // parts,
        max_steps=config.train.max_steps * parts,
        accumulate=1,
    )
    data = replace(config.data, world=world, reels=reels)
    # sources look at no loss, whose curves go by updates
    return replace(config, data=data, train=run, losses=LossesConfig())


def _stretched(curve: Curve, parts: int) -> Curve:
    return curve if isinstance(curve, float) else tuple((step * parts, value) for step, value in curve)


def check_shares(key: str, batch_size: int, parts: int) -> None:
    """Refuse a batch that does not divide by its parts and the processes.

    Args:
        key: The key of the config that says it.
        batch_size: Clips of an update, over all processes.
        parts: Of an update.

    Raises:
        ConfigError: It does not.
    """
    processes = distributed.world_size()
    if batch_size % (processes * parts):
        in_each = f" in each of {parts} parts" if parts > 1 else ""
        raise ConfigError(f"{key} {batch_size} is not a multiple of the {processes} processes{in_each}")
