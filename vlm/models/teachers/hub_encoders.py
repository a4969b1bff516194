"""Image-text towers in the layout of transformers as video encoders: frames one by one, averaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError, InvalidInput, MissingExtra
from vlm.models.teachers.frame_encoders import (
    NUM_FRAMES,
    FrameEncoder,
    FrameEncoderConfig,
    prepare_torchvision,
)
from vlm.types import Preprocessing

KINDS = ("clip", "siglip", "metaclip_2")
_KERNELS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def load_hub_encoder(
    folder: Path,
    *,
    num_frames: int | None = None,
    image_size: int | None = None,
    overrides: object = None,
) -> FrameEncoder:
    """Build a tower from a folder on this machine: weights from safetensors only, no code from the folder.

    Args:
        folder: With ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and the tokenizer.
        num_frames: Frames to sample from a clip; 8 by default.
        image_size: None or the tower's own size.
        overrides: None; there is nothing to override.

    Raises:
        InvalidInput: The model is of another kind, or has no description of its input.
        CheckpointError: Its files are incomplete or do not fit.
        MissingExtra: transformers is not installed.
        ValueError: There are overrides, or another size is asked for.
    """
    if overrides:
        raise ValueError(f"models of transformers take no overrides, got {overrides}")
    settings = _read_json(folder / "config.json")
    kind = str(settings.get("model_type", ""))
    if kind not in KINDS:
        raise InvalidInput(
            f"{folder}: a model of type {kind!r}; those that can encode videos are {', '.join(KINDS)}"
        )
    side = int(settings.get("vision_config", {}).get("image_size", 224))
    if image_size not in (None, side):
        raise ValueError(f"{folder} takes images of {side} pixels, not of {image_size}")
    tower, tokenizer, is_cut = _load(folder, kind)
    return FrameEncoder(
        tower.eval(),
        tokenizer,
        FrameEncoderConfig(architecture=kind, pretrained=folder.name, image_size=side),
        preprocessing=_preprocessing(folder, side, num_frames or NUM_FRAMES),
        name=_short_name(folder),
        is_cut=is_cut,
    )


class _Tower(nn.Module):
    """A model of transformers with open_clip's two methods."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def encode_image(self, images: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=images))

    def encode_text(self, ids: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(input_ids=ids))


def _pooled(output: Any) -> Tensor:
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors


def _load(folder: Path, kind: str) -> tuple[_Tower, Any, Callable[[str], bool]]:
    prepare_torchvision()
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "hub", "a model of the Hugging Face hub") from error
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded as a {kind} model: {error}") from error
    lost = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if lost:
        raise CheckpointError(
            f"{folder}: the weights do not fit the {kind} model: {len(lost)} names, such as "
            f"{min(map(str, lost))}",
            missing=tuple(map(str, report["missing_keys"])),
            unexpected=tuple(map(str, report["unexpected_keys"])),
        )
    longest = int(model.config.text_config.max_position_embeddings)

    def tokenize(texts: list[str]) -> Tensor:
        # padded to the full length, as these towers were trained; the padding stands after what they read
        ids: Tensor = words(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).input_ids
        return ids

    def is_cut(text: str) -> bool:
        return len(words(text, truncation=False, verbose=False).input_ids) > longest

    return _Tower(model), tokenize, is_cut


def _preprocessing(folder: Path, side: int, num_frames: int) -> Preprocessing:
    values = _read_json(folder / "preprocessor_config.json")
    kernel = _KERNELS.get(int(values.get("resample", 3)))
    if kernel is None:
        raise InvalidInput(
            f"{folder}: its images are resized with kernel {values['resample']}, not supported"
        )
    try:
        mean, std = (tuple(float(value) for value in values[name]) for name in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{folder}: preprocessor_config.json has no image_mean and image_std") from error
    return Preprocessing(
        num_frames=num_frames,
        image_size=side,
        resize=kernel,
        antialias=True,
        keep_aspect=bool(values.get("do_center_crop", False)),
        mean=mean,  # type: ignore[arg-type]  # three of them, else normalising fails at once
        std=std,  # type: ignore[arg-type]
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read, which a model of transformers needs: {error}") from error
    if not isinstance(values, dict):
        raise InvalidInput(f"{path}: expected a JSON object")
    return values


def _short_name(folder: Path) -> str:
    """Return the repository's name where the folder is a snapshot in the hub's cache."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
