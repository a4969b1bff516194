"""Root-mean-square normalisation with the residual stream in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.norm import reference
from vlm.ops.norm import registration as _registration  # noqa: F401  registers the operators


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of ``x`` (..., d) by its root mean square, in fp32; the dtype of ``x``.

    Args:
        x: Any shape ending in d.
        weight: (d,), any floating dtype.
        eps: Added to the mean square.

    Raises:
        ValueError: ``weight`` is not (d,).

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, equation 4.
    """
    return add_rms_norm(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    Args:
        x: (..., d) output of the previous block, or the tokens before the first.
        residual: (..., d) fp32 stream so far (fp64 in fp64), or None before the first block.
        weight: (d,) of the norm.
        eps: Added to the mean square.

    Returns:
        The normalised sum in the dtype of ``x``, and the new residual stream in fp32 (fp64 in fp64).

    Raises:
        ValueError: ``weight`` is not (d,), or ``residual`` has another shape than ``x``.
        KernelError: ``VLM_SCAN_BACKEND`` forces a backend that cannot serve.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be ({x.shape[-1]},) as the last axis of x, got {tuple(weight.shape)}")
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        # for a short sequence the dispatcher costs as much as the norm
        return reference.forward(x, residual, weight, eps)
    out, stream = torch.ops.vlm.add_rms_norm(x, residual, weight, eps)
    return out, stream
