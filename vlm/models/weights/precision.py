"""Which weights may leave fp32, and how tensors get into a model without being copied twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError

# decay rates, skip weights, step biases, norms, tables of positions and the temperature
_FP32 = re.compile(
    r"(^|\.)(A_log|A_b_log|D|D_b|temp|pos_embed|temporal_pos_embedding|cls_token)$"
    r"|(^|\.)dt_proj(_b)?\.bias$|(^|\.)(norm|pool_norm|LayerNorm)\.(weight|bias)$"
)
_MOST_NAMED = 8


def stays_fp32(name: str) -> bool:
    """Return whether a parameter keeps fp32 whatever dtype the model runs in."""
    return _FP32.search(name) is not None


def set_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Run matrix products and activations in ``dtype``; what needs fp32 keeps it.

    Raises:
        ValueError: It is not fp32, bf16, fp16 or fp64.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wide if stays_fp32(name) else dtype)
    return model


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str, *, shown: Callable[[str], str] = str
) -> None:
    """Put tensors into a model that was built on the meta device, as fp32 copies.

    Shapes are compared before anything is copied.

    Args:
        model: Where they go.
        tensors: By the model's names.
        where: What errors call the source.
        shown: Turns a name of the model into what errors call it.

    Raises:
        CheckpointError: A key is missing or unexpected, or a shape differs; they are named.
    """
    expected = {shown(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare(expected, {shown(name): tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    copies = {
        name: tensor.detach().to(torch.float32, copy=True).contiguous()
        if tensor.is_floating_point()
        else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    model.load_state_dict(copies, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def compare(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: They differ; the message lists what is missing, unexpected and mis-shaped.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)]
    parts = [f"{len(names)} {label}: {_list(names)}" for label, names in problems if names]
    if parts:
        message = f"{where}: the weights do not fit the model: {'; '.join(parts)}"
        raise CheckpointError(message, missing=missing, unexpected=unexpected, misshaped=shapes)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
