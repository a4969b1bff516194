"""Published BERT weights as the start of a text encoder; its attention to video has no counterpart there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.text_encoder import TextEncoder
from vlm.models.weights.files import check_storage, read_state_dict

_HEAD = "cls.predictions."
# parts of BERT without a place here; the decoder is the word table, and its bias the head's
_UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", f"{_HEAD}decoder.")
_POSITIONS = "bert.embeddings.position_embeddings.weight"


def load_bert(encoder: TextEncoder, path: Path | str) -> list[str]:
    """Give a text encoder the weights of a BERT file, such as bert-base-uncased's ``model.safetensors``.

    A longer table of positions is cut to the encoder's.

    Args:
        encoder: As many layers as the file, at its sizes.
        path: A safetensors or PyTorch file of Hugging Face's or the original names.

    Returns:
        Names of the weights that keep their values: those of the attention to video, and the language head's
        if the file has none.

    Raises:
        CheckpointError: The file is no BERT, or of other sizes; the names are given.
    """
    found = _named(read_state_dict(path), str(path))
    own = encoder.state_dict()
    if _POSITIONS in found and found[_POSITIONS].ndim == 2:
        found[_POSITIONS] = found[_POSITIONS][: len(own[_POSITIONS])]
    has_head = any(name.startswith(_HEAD) for name in found)
    kept = [name for name in own if ".crossattention." in name or (name.startswith("cls.") and not has_head)]
    if encoder.cls is None:
        found = {name: tensor for name, tensor in found.items() if not name.startswith("cls.")}
    missing = sorted(own.keys() - found.keys() - set(kept))
    unexpected = sorted(found.keys() - own.keys())
    misshaped = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & found.keys())
        if own[name].shape != found[name].shape
    ]
    if missing or unexpected or misshaped:
        problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
        told = "; ".join(f"{len(names)} {what}: {names[0]}" for what, names in problems.items() if names)
        raise CheckpointError(
            f"{path}: expected a BERT of {encoder.config.num_layers} layers and width "
            f"{encoder.config.width}: {told}",
            missing=tuple(missing),
            unexpected=tuple(unexpected),
            misshaped=tuple(misshaped),
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return kept


def _named(state: Mapping[str, object], where: str) -> dict[str, Tensor]:
    """Return a file's tensors under this encoder's names."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    check_storage(tensors, where)
    bare = not any(name.startswith("bert.") for name in tensors)
    named = {}
    for name, tensor in tensors.items():
        if bare and not name.startswith("cls."):
            name = f"bert.{name}"
        if not name.startswith(_UNUSED):
            named[_modern(name)] = tensor
    return named


def _modern(name: str) -> str:
    """Return the present name of a norm's weights; the first files were written by TensorFlow's rules."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
