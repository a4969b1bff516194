"""Addition and root-mean-square norm in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + residual`` (..., d) in the dtype of ``x``, and the sum in ``wide``'s."""
    dtype = wide(x, residual)
    stream = x.to(dtype, copy=residual is None, memory_format=torch.contiguous_format)
    if residual is not None:
        stream = (stream + residual).contiguous()
    normed = torch.nn.functional.rms_norm(stream, weight.shape, weight.to(dtype), eps)
    return normed.to(x.dtype).contiguous(), stream


def backward(
    dout: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of what was added up (..., d) and of the weight (d,), in the dtype of ``stream``.

    With rms r, n = stream r and g = dout weight: dstream + r (g - n mean(g n)), and the sum of dout n.
    """
    dout = dout.to(stream.dtype)
    rms = torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    normed = stream * rms
    dweight = (dout * normed).reshape(-1, stream.shape[-1]).sum(0)
    gradient = dout * weight.to(stream.dtype)
    gradient -= normed * (gradient * normed).mean(-1, keepdim=True)
    gradient *= rms
    if dstream is not None:
        gradient += dstream
    return gradient, dweight


def wide(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the dtype of the stream: fp32, or fp64 where something is fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)
