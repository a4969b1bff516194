"""What is in a weights file or model folder, told from names and shapes without holding the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.video_text_model import VideoTextConfig
from vlm.models.weights.files import check_storage, read_state_dict
from vlm.models.weights.folder import is_model_folder, read_card
from vlm.models.weights.official import common_dtype, configure, from_official, recognise, unwrap


def inspect(path: Path | str) -> dict[str, Any]:
    """Describe a published weights file, a model folder, or a checkpoint that contains one.

    Returns:
        ``file``, ``form``, ``kind``, ``size_bytes``, ``num_parameters``, ``dtype``, ``config`` (sizes),
        ``missing``, ``unexpected``, ``misshaped``, ``ignored``, ``resized``, and ``problem``, None if
        it loads.

    Raises:
        CheckpointError: It is no weights file, holds code, or lies about its sizes.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(
            path if is_model_folder(path) or not (path / "model").is_dir() else path / "model"
        )
    tensors = shapes_of(path)
    described = _empty(path, path.stat().st_size, common_dtype(tensors))
    try:
        form, kept, ignored = recognise(tensors)
    except CheckpointError as error:
        return {**described, "form": "unknown", "problem": str(error)}
    described |= {"form": form, "ignored": list(ignored)}
    try:
        config = configure(form, kept)
        described["config"] = _plain(config)
        heads = (
            {"num_attention_heads": config.text.num_heads} if isinstance(config, VideoTextConfig) else None
        )
        model, report = from_official(tensors, overrides=heads)
    except CheckpointError as error:
        problems = {name: list(getattr(error, name)) for name in ("missing", "unexpected", "misshaped")}
        return {**described, **problems, "problem": str(error)}
    return {
        **described,
        "kind": model.kind,
        "num_parameters": report.num_parameters,
        "missing": list(report.missing),
        "resized": list(report.resized),
    }


def shapes_of(path: Path) -> dict[str, Tensor]:
    """Return a weights file's tensors, unwrapped, on the meta device: names, shapes and types alone.

    Raises:
        CheckpointError: It is no weights file, holds code, or lies about its sizes.
    """
    if path.suffix == ".safetensors":
        return unwrap(_header(path))
    tensors = unwrap(read_state_dict(path))
    check_storage(tensors, str(path))
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _header(path: Path) -> dict[str, Tensor]:
    """Read shapes and types from the head of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  the handle is no mapping
                part = file.get_slice(name)
                dtype = types.get(part.get_dtype(), torch.int64)
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    return tensors


def _inspect_folder(folder: Path) -> dict[str, Any]:
    from vlm.models.weights.folder import build_empty, read_settings
    from vlm.models.weights.precision import compare

    settings, config = read_settings(folder)
    weights = folder / "model.safetensors"
    tensors = _header(weights)
    described = _empty(folder, weights.stat().st_size, common_dtype(tensors))
    model = build_empty(settings, config, read_card(folder), folder.name)
    described |= {
        "form": "model-folder",
        "kind": model.kind,
        "name": model.name,
        "domain": model.domain,
        "capabilities": sorted(model.capabilities),
        "num_parameters": model.num_parameters,
        "config": _plain(config),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        compare(
            {name: tuple(value.shape) for name, value in model.state_dict().items()}, shapes, str(weights)
        )
    except CheckpointError as error:
        problems = {name: list(getattr(error, name)) for name in ("missing", "unexpected", "misshaped")}
        described |= {**problems, "problem": str(error)}
    return described


def _empty(path: Path, size_bytes: int, dtype: str) -> dict[str, Any]:
    lists: dict[str, list[str]] = {
        name: [] for name in ("missing", "unexpected", "misshaped", "ignored", "resized")
    }
    head = {"file": str(path), "form": None, "kind": None, "size_bytes": size_bytes, "num_parameters": None}
    return {**head, "dtype": dtype, "config": None, **lists, "problem": None}


def _plain(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)
