"""The recurrence as one readable loop, forward and backward: the truth the other implementations follow.

Letters: b batch, l length, e channels, g groups, n states. Everything is channels-last and in one dtype
(fp32 or fp64); the gate is applied by the caller. For every batch row, channel and state, in scan order:

    dt[t] = softplus(delta[t] + bias)            h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]
    y[t]  = sum_n h[t] C[t] + D u[t]             h before the first step = initial state or 0

Source: Gu and Dao 2023, Mamba, equation 2a with B discretised by Euler's rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# a state is kept at the start of every so many steps, for the backward pass
CHECKPOINT_EVERY = 32
# above this, softplus(x) = x in fp32; torch and mamba-ssm switch here too
SOFTPLUS_THRESHOLD = 20.0


class Scan(NamedTuple):
    """One direction's inputs, channels-last, in one dtype.

    Attributes:
        u: (b, l, e).
        delta: (b, l, e), before bias and softplus.
        A: (e, n).
        B: (b, l, g, n); channel i belongs to group i // (e / g).
        C: (b, l, g, n).
        D: (e,) or None.
        bias: (e,) added to delta, or None.
        initial: (b, e, n) state before the first step, or None for zeros.
        segments: (b, l) int32 segment number of every step, or None; the state is dropped where it changes.
        softplus: Whether delta passes softplus.
        reverse: Whether the scan runs from the last step to the first.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor | None
    segments: Tensor | None
    softplus: bool
    reverse: bool


class ScanGradients(NamedTuple):
    """Gradients of one direction, shaped as their inputs; None where the input was None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor | None


def num_checkpoints(length: int) -> int:
    """Return how many states are kept for a sequence of ``length`` steps."""
    return -(-length // CHECKPOINT_EVERY)


def step_size(s: Scan) -> tuple[Tensor, Tensor]:
    """Return dt (b, l, e) and its derivative with respect to delta."""
    raw = s.delta if s.bias is None else s.delta + s.bias
    if not s.softplus:
        return raw, torch.ones_like(raw)
    slope = torch.where(raw > SOFTPLUS_THRESHOLD, torch.ones_like(raw), torch.sigmoid(raw))
    return torch.nn.functional.softplus(raw, threshold=SOFTPLUS_THRESHOLD), slope


def resets(s: Scan) -> Tensor | None:
    """Return (b, l) bool: steps that start from an empty state because a segment ended just before."""
    if s.segments is None:
        return None
    changed = torch.zeros_like(s.segments, dtype=torch.bool)
    if s.reverse:
        changed[:, :-1] = s.segments[:, 1:] != s.segments[:, :-1]
    else:
        changed[:, 1:] = s.segments[:, 1:] != s.segments[:, :-1]
    return changed


def forward(s: Scan, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan.

    Returns:
        y (b, l, e) before the gate; the last state (b, e, n); and, if ``save``, the states
        (b, ceil(l / 32), n, e) at the start of every 32 steps in scan order, else an empty tensor.
    """
    dt, _ = step_size(s)
    drops = resets(s)
    batch, length, channels = s.u.shape
    B, C = _per_channel(s.B, channels), _per_channel(s.C, channels)
    h = _initial(s)
    y = torch.empty_like(s.u, memory_format=torch.contiguous_format)
    kept = []
    for step, t in enumerate(_order(length, s.reverse)):
        if step % CHECKPOINT_EVERY == 0:
            kept.append(h.transpose(1, 2))
        decay = torch.exp(dt[:, t, :, None] * s.A)
        if drops is not None:
            decay = decay.masked_fill(drops[:, t, None, None], 0)
        h = decay * h + (dt[:, t] * s.u[:, t])[..., None] * B[:, t]
        y[:, t] = (h * C[:, t]).sum(-1)
    if s.D is not None:
        y = y + s.D * s.u
    return y, h.contiguous(), torch.stack(kept, 1).contiguous() if save else s.u.new_empty(0)


def backward(dy: Tensor, s: Scan, checkpoints: Tensor | None = None) -> ScanGradients:
    """Return the gradients of sum(y * dy); ``checkpoints`` is not needed here.

    With g[t] the gradient of h[t]:  g[t] = dy[t] C[t] + exp(dt[t+1] A) g[t+1].
    """
    dt, slope = step_size(s)
    drops = resets(s)
    batch, length, channels = s.u.shape
    B, C = _per_channel(s.B, channels), _per_channel(s.C, channels)
    order = list(_order(length, s.reverse))
    states = [_initial(s)]
    decays = []
    for t in order:
        decay = torch.exp(dt[:, t, :, None] * s.A)
        if drops is not None:
            decay = decay.masked_fill(drops[:, t, None, None], 0)
        decays.append(decay)
        states.append(decay * states[-1] + (dt[:, t] * s.u[:, t])[..., None] * B[:, t])
    du, ddt = torch.zeros_like(dt), torch.zeros_like(dt)
    dB, dC = torch.zeros_like(s.B), torch.zeros_like(s.C)
    dA = torch.zeros_like(s.A)
    carry = torch.zeros_like(states[0])
    for step in range(length - 1, -1, -1):
        t = order[step]
        dh = dy[:, t, :, None] * C[:, t] + carry
        carry = decays[step] * dh
        through_decay = carry * states[step]
        along_b = (dh * B[:, t]).sum(-1)
        du[:, t] = along_b * dt[:, t]
        ddt[:, t] = along_b * s.u[:, t] + (through_decay * s.A).sum(-1)
        dA += (through_decay * dt[:, t, :, None]).sum(0)
        dB[:, t] = _per_group(dh * (dt[:, t] * s.u[:, t])[..., None], s.B.shape[2])
        dC[:, t] = _per_group(states[step + 1] * dy[:, t, :, None], s.C.shape[2])
    ddelta = ddt * slope
    return ScanGradients(
        u=du if s.D is None else du + dy * s.D,
        delta=ddelta,
        A=dA,
        B=dB,
        C=dC,
        D=None if s.D is None else (dy * s.u).sum((0, 1)),
        bias=None if s.bias is None else ddelta.sum((0, 1)),
        initial=None if s.initial is None else carry,
    )


def _order(length: int, reverse: bool) -> range:
    """Return the time indices in scan order."""
    return range(length - 1, -1, -1) if reverse else range(length)


def _initial(s: Scan) -> Tensor:
    """Return the state before the first step."""
    if s.initial is not None:
        return s.initial
    return s.u.new_zeros(s.u.shape[0], s.u.shape[2], s.A.shape[1])


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """Repeat (b, l, g, n) to (b, l, e, n)."""
    return x.repeat_interleave(channels // x.shape[2], dim=2)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """Sum (b, e, n) over each group's channels to (b, g, n)."""
    return torch.unflatten(x, 1, (groups, -1)).sum(2)
