"""PyTorch in the place of mamba-ssm's and causal-conv1d's extensions."""

from __future__ import annotations

import torch

from vlm.ops import selective_scan
from vlm.ops.causal_conv import conv2


def scan_forward(u, delta, A, B, C, D, z, bias, softplus):
    arguments = (u, delta, A, B, C, D, None, bias, softplus)
    return selective_scan(*arguments), None, selective_scan(u, delta, A, B, C, D, z, bias, softplus)


def scan_backward(u, delta, A, B, C, D, z, bias, dout, _states, _out, _dz, softplus, _recompute):
    leaves = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]
    with torch.enable_grad():
        out = selective_scan(*leaves, softplus)
    du, ddelta, dA, dB, dC, dD, dz, dbias = torch.autograd.grad(out, leaves, dout)
    return du, ddelta, dA, dB, dC, dD, dbias, dz


def conv_forward(x, weight, bias, _ids, _initial, out, _final, silu):
    assert silu
    out.copy_(conv2(x.transpose(1, 2), weight, bias)[0].transpose(1, 2))


def conv_backward(x, weight, bias, dout, _ids, _initial, _dfinal, dx, dweight, dbias, _dinitial, silu):
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    with torch.enable_grad():
        out = conv2(leaves[0].transpose(1, 2), *leaves[1:])[0].transpose(1, 2)
    for place, value in zip((dx, dweight, dbias), torch.autograd.grad(out, leaves, dout), strict=True):
        place.copy_(value)
