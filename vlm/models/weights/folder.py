"""Model folders: ``config.yaml``, ``model.safetensors``, ``tokenizer.json``, ``card.json``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.crashes import crash_point
from vlm.errors import CheckpointError, IntegrityError, InvalidInput
from vlm.models.classifier import Classifier, ClassifierConfig, EncoderConfig, EncoderModel
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextConfig, VideoTextModel
from vlm.models.weights.files import read_state_dict
from vlm.models.weights.precision import fill
from vlm.models.weights.resizing import Overrides, apply_overrides, fit_tables
from vlm.text import Tokenizer
from vlm.types import Preprocessing

FORMAT = "vlm-model/1"
_TIMES = "temporal_pos_embedding"
KINDS: dict[str, tuple[Any, type[Any]]] = {
    "video-text": (VideoTextModel, VideoTextConfig),
    "classifier": (Classifier, ClassifierConfig),
    "encoder": (EncoderModel, EncoderConfig),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig:
    """Root of ``config.yaml``."""

    format: str = FORMAT
    kind: str = "video-text"
    model: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


def save_model(
    model: VideoModel,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder; whoever opens the path meanwhile finds the old folder or the whole new one.

    Args:
        model: What to save; kinds ``video-text``, ``classifier`` and ``encoder``.
        folder: Where; an existing model folder is replaced, anything else that is not empty is not.
        dtype: Store floating-point weights in this type, for example fp16 to halve the size; as they are by
            default. What must stay fp32 stays so.
        card: More entries for ``card.json``: command, seed, scores, licence, source.

    Returns:
        The folder.

    Raises:
        InvalidInput: The kind cannot be saved, or the path holds something that is not a model folder.
    """
    from vlm.config import to_dict

    folder = Path(folder)
    if model.kind not in KINDS:
        raise InvalidInput(f"a {model.kind!r} model cannot be saved as a folder; keep its source instead")
    if folder.exists() and not (folder / "config.yaml").is_file() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} exists and is not a model folder; choose another path")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder, "partial")
    partial.mkdir()
    try:
        weights = _write_weights(model, partial / "model.safetensors", dtype)
        settings = FolderConfig(
            kind=model.kind, model=to_dict(model.config), preprocessing=model.preprocessing
        )
        _write(partial / "config.yaml", _yaml(to_dict(settings)))
        tokenizer = getattr(model, "_tokenizer", None)
        if tokenizer is not None:
            _write(partial / "tokenizer.json", tokenizer.to_json())
        content = {**dict(card or {}), **_card(model, weights)}
        _write(partial / "card.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        _sync(partial)
        _swap(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def is_hub_folder(path: Path) -> bool:
    """Whether a folder holds a model in the layout of Hugging Face transformers."""
    return (path / "config.json").is_file() and not (path / "config.yaml").exists()


def sweep_partial(parent: Path) -> None:
    """Remove what kills during ``save_model`` left in a folder that nobody writes now."""
    for kind in ("partial", "old"):
        for leftover in parent.glob(f".*.????????.{kind}"):
            shutil.rmtree(leftover)


def is_model_folder(path: Path) -> bool:
    """Return whether a path looks like a model folder."""
    return (path / "config.yaml").is_file() and (path / "model.safetensors").is_file()


def read_card(folder: Path | str) -> dict[str, Any]:
    """Return the content of ``card.json``.

    Raises:
        CheckpointError: It is missing or not a JSON object.
    """
    path = Path(folder) / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(card).__name__}")
    return card


def load_folder(
    folder: Path | str,
    *,
    num_frames: int | None = None,
    image_size: int | None = None,
    overrides: Overrides | None = None,
) -> VideoModel:
    """Read a model folder into an evaluating model on the CPU, in fp32.

    Args:
        folder: A model folder.
        num_frames: Other number of frames: the table of times is resized, or zero if there was none.
        image_size: Other size: the table of positions is resized.
        overrides: Settings to change, see ``resizing.SETTINGS``.

    Raises:
        CheckpointError: A file is missing, or the weights do not fit the configuration; the keys are named.
        ConfigError: ``config.yaml`` has an unknown key or a wrong value.
        IntegrityError: The weights are not those that the card was written for.
    """
    folder = Path(folder)
    settings, config = read_settings(folder)
    card = read_card(folder)
    weights = folder / "model.safetensors"
    expected, found = card.get("weights_sha256"), file_sha256(weights)
    if expected not in (None, found):
        raise IntegrityError(f"{weights}: the checksum differs from card.json; fetch it again")
    was_of_pictures = config.vision.num_frames == 1
    config = apply_overrides(config, num_frames, image_size, overrides)
    model = build_empty(settings, config, card, folder.name)
    state, resized, ignored = fit_tables(read_state_dict(weights), config.vision, "vision_encoder.")
    missing = [_TIMES] if was_of_pictures and config.vision.num_frames > 1 else []
    for name in missing:
        state[f"vision_encoder.{name}"] = torch.zeros(1, config.vision.num_steps, config.vision.width)
    fill(model, state, str(weights))
    model.loaded = {
        "file": weights.name,
        "sha256": found,
        "form": "model folder",
        "num_matched": len(state) - len(missing),
        "missing": missing,
        "unexpected": [],
        "resized": list(resized),
        "num_ignored": len(ignored),
    }
    if isinstance(model, VideoTextModel) and (folder / "tokenizer.json").is_file():
        model.tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    return model.eval()


def read_settings(folder: Path) -> tuple[FolderConfig, Any]:
    """Read ``config.yaml``: its root, and the model's own configuration.

    Raises:
        CheckpointError: This is no model folder, or of another format.
        ConfigError: It has an unknown key or a wrong value.
    """
    from vlm.config import build, load_config

    path = folder / "config.yaml"
    if not is_model_folder(folder):
        raise CheckpointError(f"{folder}: expected a model folder with config.yaml and model.safetensors")
    settings = load_config(FolderConfig, path)
    if settings.format != FORMAT or settings.kind not in KINDS:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r} and a kind of {', '.join(KINDS)}, "
            f"got {settings.format!r} and {settings.kind!r}"
        )
    return settings, build(KINDS[settings.kind][1], settings.model, where=f"{path}: model")


def build_empty(settings: FolderConfig, config: Any, card: Mapping[str, Any], name: str) -> VideoModel:
    """Build a folder's model on the meta device, without weights."""
    frames, size = config.vision.num_frames, config.vision.image_size
    with torch.device("meta"):
        model: VideoModel = KINDS[settings.kind][0](
            config,
            preprocessing=replace(settings.preprocessing, num_frames=frames, image_size=size),
            name=str(card.get("name", name)),
            domain=str(card.get("domain", "open")),
            capabilities=card.get("capabilities"),
        )
    return model


def _card(model: VideoModel, weights: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": "vlm-model-card/1",
        "name": model.name,
        "kind": model.kind,
        "domain": model.domain,
        "capabilities": sorted(model.capabilities),
        "num_parameters": model.num_parameters,
        "preprocessing": asdict(model.preprocessing),
        **weights,
    }


def _write_weights(model: VideoModel, path: Path, dtype: torch.dtype | None) -> dict[str, str]:
    """Write the weights; return how they are stored and their hash."""
    from safetensors.torch import save_file

    from vlm.models.weights.precision import stays_fp32

    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        kept = dtype is None or not tensor.is_floating_point() or stays_fp32(name)
        tensors[name] = tensor.detach().cpu().to(tensor.dtype if kept else dtype).contiguous().clone()
    save_file(tensors, path, metadata={"format": "pt"})
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return {"weights_dtype": "+".join(stored), "weights_sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(folder: Path) -> None:
    """Force every file of a folder, then the folder, to the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}"


def _swap(partial: Path, folder: Path) -> None:
    """Put the new folder in the old one's place."""
    crash_point("model-before-swap")
    old = _beside(folder, "old")
    if folder.exists():
        folder.rename(old)
    crash_point("model-in-swap")
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    crash_point("model-swapped")
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
