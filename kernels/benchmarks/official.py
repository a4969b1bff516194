"""The published way through a block, to compare with: mamba-ssm's kernels, two scans, flips, channels first.

Li et al. 2024, VideoMamba, runs Vision Mamba's block: the input projection gives (b, 2e, l); each direction
convolves, projects and scans, the second one a flipped copy, whose output is flipped back and added. What the
published autograd function computes again in the backward pass is kept here instead: more memory, less time.
The norm and everything around the blocks are ours in both.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from build_official import CONV, SCAN
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vlm.models.mamba_block import BidirectionalMixer


def modules(folder: Path | None = None) -> tuple[Any, Any]:
    """Return the extensions of the scan and the convolution, from ``folder`` or where Python finds them.

    Raises:
        ImportError: There are none.
    """
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(SCAN), importlib.import_module(CONV)


@contextmanager
def serving() -> Iterator[None]:
    """Let every mixer run the published way."""
    ours = BidirectionalMixer.forward
    BidirectionalMixer.forward = mix  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        BidirectionalMixer.forward = ours  # type: ignore[method-assign]


def mix(mixer: BidirectionalMixer, tokens: Tensor) -> Tensor:
    """Mix (b, l, d) like ``BidirectionalMixer.forward``."""
    length = tokens.shape[1]
    projected = mixer.in_proj.weight @ rearrange(tokens, "b l d -> d (b l)")
    xz = rearrange(projected, "e (b l) -> b e l", l=length)
    ahead = (mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    back = (mixer.conv1d_b, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b)
    out = _direction(xz, *ahead) + _direction(xz.flip(-1), *back).flip(-1)
    return F.linear(rearrange(out, "b e l -> b l e"), mixer.out_proj.weight)


def scans(ahead: list[Tensor], back: list[Tensor]) -> Tensor:
    """Run both scans of a block as the published code does.

    Args:
        ahead: u, delta, A, B, C, D, z, bias: sequences (b, e, l), B and C (b, 1, n, l).
        back: Those of the other direction, in the order of time; u, delta, B and C count as flipped already
            (the published code flips what they are made of), z is flipped here.
    """
    u, delta, A, B, C, D, z, bias = back
    return _scan(*ahead) + _scan(u, delta, A, B, C, D, z.flip(-1), bias).flip(-1)


def _direction(xz: Tensor, conv: Any, x_proj: Any, dt_proj: Any, A_log: Tensor, D: Tensor) -> Tensor:
    x, z = xz.chunk(2, dim=1)
    length, rank = x.shape[-1], dt_proj.in_features
    u: Tensor = _Conv.apply(x, conv.weight.squeeze(1), conv.bias)  # type: ignore[no-untyped-call]
    rows = F.linear(rearrange(u, "b e l -> (b l) e"), x_proj.weight)
    delta = rearrange(dt_proj.weight.to(rows.dtype) @ rows[:, :rank].t(), "e (b l) -> b e l", l=length)
    B, C = (
        rearrange(part, "(b l) n -> b 1 n l", l=length).contiguous()
        for part in rows[:, rank:].chunk(2, dim=1)
    )
    return _scan(u, delta, -torch.exp(A_log.float()), B, C, D.float(), z, dt_proj.bias.float())


def _scan(*inputs: Tensor) -> Tensor:
    gated: Tensor = _Scan.apply(*inputs)  # type: ignore[no-untyped-call]
    return gated


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        u, delta, A, B, C, D, z, bias = inputs
        u, delta, z = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, delta, z))
        extension = importlib.import_module(SCAN)
        out, states, gated = extension.fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, out)
        return gated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        *inputs, states, out = ctx.saved_tensors
        extension = importlib.import_module(SCAN)
        du, ddelta, dA, dB, dC, dD, dbias, dz, *_ = extension.bwd(
            *inputs, gradients[0].contiguous(), states, out, None, True, False
        )
        return du, ddelta, dA, dB.to(inputs[3].dtype), dC.to(inputs[4].dtype), dD, dz, dbias


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        importlib.import_module(CONV).causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dweight, dbias = (torch.zeros_like(each, dtype=torch.float32) for each in (weight, bias))
        importlib.import_module(CONV).causal_conv1d_bwd(
            x, weight, bias, gradients[0].contiguous(), None, None, None, dx, dweight, dbias, None, True
        )
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)
