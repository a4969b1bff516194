"""The short depthwise convolution in front of the scan, for both directions at once."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.causal_conv import registration as _registration  # noqa: F401  registers the operators
from vlm.ops.selective_scan import segment_numbers


def conv2(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None = None,
    weight_b: Tensor | None = None,
    bias_b: Tensor | None = None,
    *,
    segment_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve along time, depthwise, and apply SiLU: causally, and mirrored if ``weight_b`` is given.

    Forward: silu(bias_f + sum_k weight_f[:, k] x[t - (w-1-k)]); backward: silu(bias_b + sum_k weight_b[:, k]
    x[t + (w-1-k)]), which equals the causal convolution of the reversed sequence, reversed again.

    Args:
        x: (batch, length, dim), any strides.
        weight_f: (dim, w) or (dim, 1, w) taps of the causal direction.
        bias_f: (dim,) or None.
        weight_b: Taps of the anti-causal direction, or None to leave it out.
        bias_b: (dim,) or None.
        segment_starts: As in ``selective_scan``; taps beyond a border count as zero.

    Returns:
        Both outputs, (batch, length, dim) in the dtype of ``x``; the second is None without ``weight_b``.

    Raises:
        ValueError: A shape does not fit; the message names the argument.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, dim) and not empty, got {tuple(x.shape)}")
    dim = x.shape[2]
    weight_f = _taps("weight_f", weight_f, dim)
    if weight_b is not None:
        weight_b = _taps("weight_b", weight_b, dim)
        if weight_b.shape != weight_f.shape:
            raise ValueError(
                f"weight_b must be {tuple(weight_f.shape)} as weight_f, got {tuple(weight_b.shape)}"
            )
    elif bias_b is not None:
        raise ValueError("bias_b needs weight_b; got None; give both or neither")
    for name, bias in (("bias_f", bias_f), ("bias_b", bias_b)):
        if bias is not None and tuple(bias.shape) != (dim,):
            raise ValueError(f"{name} must be ({dim},), got {tuple(bias.shape)}")
    segments = segment_numbers(segment_starts, x.shape[0], x.shape[1], x.device)
    u_f, u_b = torch.ops.vlm.conv2(x, weight_f, bias_f, weight_b, bias_b, segments)
    return u_f, None if weight_b is None else u_b


def _taps(name: str, weight: Tensor, dim: int) -> Tensor:
    """Return the weight as (dim, w)."""
    flat = weight.squeeze(1) if weight.dim() == 3 and weight.shape[1] == 1 else weight
    if flat.dim() != 2 or flat.shape[0] != dim or flat.shape[1] == 0:
        raise ValueError(f"{name} must be ({dim}, w) or ({dim}, 1, w), got {tuple(weight.shape)}")
    return flat
