"""Low-rank adapters: small matrices beside a trained model's projections, which learn in their place.

The only module that imports peft.
"""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigError, MissingExtra
from vlm.models.teachers.frame_encoders import prepare_torchvision
from vlm.models.video_model import VideoModel
from vlm.training.config import LoraConfig

FOLDER = "adapter"
# projections of the video encoder's mixers, and of attention in the text encoder
_USUAL = ("in_proj", "x_proj", "x_proj_b", "out_proj", "query", "key", "value")


def add_adapters(model: VideoModel, config: LoraConfig, seed: int) -> None:
    """Put adapters into a model, whose output does not change by it; afterwards they alone learn.

    Args:
        model: Its linear layers that are named get an adapter each.
        config: Rank, layers, and what else learns.
        seed: Of their first matrices; the second ones are zero.

    Raises:
        MissingExtra: peft is not installed.
        ConfigError: A target names no linear layer, or a further part no parameter.

    Source: Hu et al. 2021, LoRA, section 4.1.
    """
    peft = _import()
    parts = model.named_modules()
    linear = {name.rpartition(".")[2] for name, part in parts if isinstance(part, nn.Linear)}
    unknown = [target for target in config.targets if target not in linear]
    if unknown:
        raise ConfigError(
            f"train.lora.targets: the model has no linear layer {unknown[0]!r}; it has "
            f"{', '.join(sorted(linear))}"
        )
    targets = config.targets or tuple(name for name in _USUAL if name in linear)
    wanted = "|".join(map(re.escape, targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=rf"(.*\.)?({wanted})",
            ),
            model,
        )
    for prefix in config.others:
        others = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not others:
            raise ConfigError(f"train.lora.others: no parameter starts with {prefix!r}")
        for parameter in others:
            parameter.requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return any(hasattr(part, "lora_A") for part in model.modules())


def merged(model: VideoModel) -> VideoModel:
    """Return a copy of the model whose weights include its adapters; the model itself if it has none."""
    if not is_adapted(model):
        return model
    plain = copy.deepcopy(model)
    for name, part in list(plain.named_modules()):
        if hasattr(part, "lora_A"):
            layer: Any = part
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, layer.get_base_layer())
    return plain.requires_grad_(True)


def save_adapter(model: VideoModel, folder: Path) -> None:
    """Write the adapters as peft does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    What learned beside them lies in ``others.safetensors``, under the model's names.
    """
    from safetensors.torch import save_file

    peft = _import()
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings: Any = model.peft_config
    settings["default"].save_pretrained(str(folder))
    others = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    if others:
        save_file(others, folder / "others.safetensors", metadata={"format": "pt"})


def frozen_hash(model: nn.Module) -> str:
    """Return a hash of the weights that do not learn, which a checkpoint of adapters leaves out."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _import() -> Any:
    prepare_torchvision()  # peft imports models of transformers, which import torchvision
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "lora", "train.lora") from error
    return peft
