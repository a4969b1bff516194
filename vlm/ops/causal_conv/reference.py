"""The depthwise causal convolution with SiLU, by its definition, forward and backward.

Letters: b batch, l length, e channels, w taps. Channels-last. The anti-causal direction is the mirror image:
it sees the steps after, with the same tap order as a causal convolution of the reversed sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, *, anticausal: bool
) -> Tensor:
    """Return silu(bias + sum_k weight[:, k] x[t - (w-1-k)]), or x[t + (w-1-k)] if ``anticausal``.

    Args:
        x: (b, l, e).
        weight: (e, w).
        bias: (e,) or None.
        segments: (b, l) segment numbers or None; taps in another segment count as zero.
        anticausal: Mirror the direction.
    """
    return torch.nn.functional.silu(_convolve(x, weight, bias, segments, anticausal=anticausal))


def backward(
    du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, *, anticausal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of sum(u * du): dx (b, l, e), dweight (e, w), dbias (e,)."""
    c = _convolve(x, weight, bias, segments, anticausal=anticausal)
    gate = torch.sigmoid(c)
    dc = du * gate * (1 + c * (1 - gate))
    taps = weight.shape[1]
    dx = torch.zeros_like(dc)
    dweight = []
    for k in range(taps):
        lag = taps - 1 - k if not anticausal else k + 1 - taps
        dx = dx + weight[:, k] * _shift(dc, -lag, segments)
        dweight.append((dc * _shift(x, lag, segments)).sum((0, 1)))
    return dx, torch.stack(dweight, 1), dc.sum((0, 1))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, *, anticausal: bool
) -> Tensor:
    """Return the convolution before SiLU."""
    taps = weight.shape[1]
    c = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(taps):
        lag = taps - 1 - k if not anticausal else k + 1 - taps
        c = c + weight[:, k] * _shift(x, lag, segments)
    return c


def _shift(x: Tensor, lag: int, segments: Tensor | None) -> Tensor:
    """Return x[t - lag], zero outside the sequence and across segment borders."""
    if lag == 0:
        return x
    length = x.shape[1]
    out = torch.zeros_like(x)
    if abs(lag) >= length:
        return out
    here = slice(lag, None) if lag > 0 else slice(None, lag)
    there = slice(None, -lag) if lag > 0 else slice(-lag, None)
    moved = x[:, there]
    if segments is not None:
        moved = moved * (segments[:, here] == segments[:, there]).unsqueeze(-1)
    out[:, here] = moved
    return out
