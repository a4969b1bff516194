"""Settings that may change at loading, and the tables that follow the number of frames and the size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from vlm.models.patch_embedding import resize_positions, resize_times
from vlm.models.video_mamba import VideoMambaConfig

Overrides = Mapping[str, Any]
Config = TypeVar("Config")

# setting: (part of the configuration, its field)
SETTINGS: dict[str, tuple[str, str]] = {
    "num_attention_heads": ("text", "num_heads"),
    "dropout": ("text", "dropout"),
    "drop_path": ("vision", "drop_path"),
    "pool": ("vision", "pool"),
    "alignment_interval": ("vision", "alignment_interval"),
    "activation_checkpointing": ("vision", "activation_checkpointing"),
}


def apply_overrides(
    config: Config, num_frames: int | None, image_size: int | None, overrides: Overrides | None
) -> Config:
    """Return a configuration with other frames, size and settings.

    Raises:
        ValueError: A setting is unknown, or does not exist for this kind of model.
    """
    changes: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    for name, value in (overrides or {}).items():
        part, attribute = SETTINGS.get(name, ("", ""))
        if not part or not hasattr(config, part):
            known = ", ".join(key for key, place in SETTINGS.items() if hasattr(config, place[0]))
            raise ValueError(f"overrides has no setting {name!r} for this model; known: {known}")
        changes[part][attribute] = value
    if num_frames is not None:
        changes["vision"]["num_frames"] = num_frames
    if image_size is not None:
        changes["vision"]["image_size"] = image_size
    parts = {part: replace(getattr(config, part), **values) for part, values in changes.items() if values}
    return replace(config, **parts) if parts else config  # type: ignore[type-var]


def fit_tables(
    tensors: Mapping[str, Tensor], vision: VideoMambaConfig, prefix: str
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Resize the tables of space and time to an encoder's configuration.

    Args:
        tensors: Weights by name.
        vision: The encoder that they shall fit.
        prefix: In front of the encoder's names.

    Returns:
        The fitted tensors, what was resized (old and new length), and which names are no longer needed.
    """
    fitted = dict(tensors)
    resized: list[str] = []
    ignored: list[str] = []
    space, time = f"{prefix}pos_embed", f"{prefix}temporal_pos_embedding"
    if space in fitted and fitted[space].ndim == 3 and fitted[space].shape[1] != vision.grid**2 + 1:
        old = fitted[space].shape[1]
        fitted[space] = resize_positions(fitted[space], vision.grid)
        resized.append(f"pos_embed: {old} -> {vision.grid**2 + 1} positions")
    if time in fitted and vision.num_frames == 1:
        del fitted[time]
        ignored.append(time.removeprefix(prefix))
    elif time in fitted and fitted[time].ndim == 3 and fitted[time].shape[1] != vision.num_steps:
        old = fitted[time].shape[1]
        fitted[time] = resize_times(fitted[time], vision.num_steps)
        resized.append(f"temporal_pos_embedding: {old} -> {vision.num_steps} steps")
    return fitted, tuple(resized), tuple(ignored)
