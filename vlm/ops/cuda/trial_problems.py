"""The small problems that CUDA operators are tried on: what the kernels compute, and the truth beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm.ops.causal_conv import reference as conv_reference
from vlm.ops.cuda import conv_calls, norm_calls, scan_calls, scan_gradients
from vlm.ops.cuda.arguments import allows_tf32
from vlm.ops.cuda.registry import SCAN_RANKS
from vlm.ops.norm import reference as norm_reference
from vlm.ops.selective_scan import chunked
from vlm.ops.selective_scan.reference import Scan, ScanGradients
from vlm.ops.selective_scan.registration import silu_backward

# what the kernels gave, and what is right
Results = tuple[list[Tensor], list[Tensor]]

_BATCH, _LENGTH, _CHANNELS, _STATES = 2, 75, 64, 16
_WIDTH, _TAPS, _EPS = 192, 4, 1e-5


def scan(device: torch.device, dtype: torch.dtype) -> Results:
    """Return what both directions give together, against PyTorch in fp32.

    Compared are the output, the sum before the gate, the kept states and all gradients; also where the
    kernels multiply rank rows themselves, which they do of half types, and of fp32 if that may be in tf32.
    """
    found: list[Tensor] = []
    expected: list[Tensor] = []
    multiplies = dtype != torch.float32 or allows_tf32()
    for rank in (0, SCAN_RANKS[0]) if multiplies else (0,):
        scans, z, weights, dout = _draw_scan(device, dtype, rank)
        found += _by_kernels(scans, z, weights, dout)
        expected += _by_pytorch(scans, z, weights, dout)
    return found, expected


def _draw_scan(
    device: torch.device, dtype: torch.dtype, rank: int
) -> tuple[list[Scan], Tensor, list[Tensor], Tensor]:
    """Return two directions, the gate, the weights of rank rows if any, and the output's gradient."""
    draw = _drawing(device)
    # what bf16 holds tf32 holds too: a product of such numbers is as exact as the rest is
    narrow = torch.bfloat16 if rank else dtype
    scans = []
    for reverse in (False, True):
        u = draw(_BATCH, _LENGTH, _CHANNELS).to(dtype)
        delta = draw(_BATCH, _LENGTH, rank or _CHANNELS).to(narrow).to(dtype)
        B, C = (draw(_BATCH, _LENGTH, 1, _STATES).to(dtype) for _ in range(2))
        A, D, bias = -draw(_CHANNELS, _STATES).abs() - 0.1, draw(_CHANNELS), draw(_CHANNELS)
        scans.append(Scan(u, delta, A, B, C, D, bias, None, None, True, reverse))
    z, dout = (draw(_BATCH, _LENGTH, _CHANNELS).to(dtype) for _ in range(2))
    weights = [(draw(_CHANNELS, rank) / rank**0.5).to(narrow).to(dtype) for _ in scans if rank]
    return scans, z, weights, dout


def _by_kernels(scans: list[Scan], z: Tensor, weights: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Return outputs and gradients as the kernels compute them."""
    out, total, kept = scan_calls.bi_scan_forward(scans, z, weights, save=True)
    gradients, joined, dz = scan_gradients.bi_scan_backward(dout, scans, z, weights, total, kept)
    parameters = [x for g in gradients for x in _compared(g)]
    return [out, total, kept, dz, *joined, *parameters]


def _by_pytorch(scans: list[Scan], z: Tensor, weights: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Return the same as PyTorch computes it in fp32."""
    singles = [s._replace(u=s.u.float(), delta=s.delta.float(), B=s.B.float(), C=s.C.float()) for s in scans]
    if weights:
        singles = [s._replace(delta=s.delta @ w.float().t()) for s, w in zip(singles, weights, strict=True)]
    parts = [chunked.forward(s, save=True) for s in singles]
    total = parts[0][0] + parts[1][0]
    dy, dz = silu_backward(dout.float(), total, z.float())
    gradients = [chunked.backward(dy, s, kept) for s, (_, _, kept) in zip(singles, parts, strict=True)]
    joined = [torch.cat([g.B, g.C], -1).squeeze(2) for g in gradients]
    parameters = [x for g in gradients for x in _compared(g)]
    kept = torch.stack([kept for _, _, kept in parts])
    return [total * torch.nn.functional.silu(z.float()), total, kept, dz, *joined, *parameters]


def _compared(g: ScanGradients) -> list[Tensor]:
    """Return the gradients besides those of B and C."""
    return [x for x in (g.u, g.delta, g.A, g.D, g.bias) if x is not None]


def convolution(device: torch.device, dtype: torch.dtype) -> Results:
    """Return outputs and gradients of both directions, against fp64."""
    draw = _drawing(device)
    x, *du = (draw(_BATCH, _LENGTH, _WIDTH).to(dtype) for _ in range(3))
    parameters = [draw(_WIDTH, _TAPS), draw(_WIDTH), draw(_WIDTH, _TAPS), draw(_WIDTH)]
    weight_f, bias_f, weight_b, bias_b = parameters
    outputs = conv_calls.conv2_forward(x, weight_f, bias_f, weight_b, bias_b, None)
    gradients = conv_calls.conv2_backward(du[0], du[1], x, weight_f, bias_f, weight_b, bias_b, None)
    expected, changes = [], []
    for place in (0, 1):
        weight, bias = (each.double() for each in parameters[2 * place : 2 * place + 2])
        options = {"anticausal": place == 1}
        expected.append(conv_reference.forward(x.double(), weight, bias, None, **options))
        changes.append(conv_reference.backward(du[place].double(), x.double(), weight, bias, None, **options))
    truth = [*expected, changes[0][0] + changes[1][0], *changes[0][1:], *changes[1][1:]]
    return [*outputs, *(each for each in gradients if each is not None)], truth


def residual_norm(device: torch.device, dtype: torch.dtype) -> Results:
    """Return outputs and gradients, against fp64."""
    draw = _drawing(device)
    x, dout = (draw(_BATCH, _LENGTH, _WIDTH).to(dtype) for _ in range(2))
    residual, dstream = (draw(_BATCH, _LENGTH, _WIDTH) for _ in range(2))
    weight = draw(_WIDTH)
    found = [
        *norm_calls.add_rms_norm_forward(x, residual, weight, _EPS),
        *norm_calls.add_rms_norm_backward(dout, dstream, residual, weight, _EPS, both=True),
    ]
    wide = weight.double()
    outputs = norm_reference.forward(x.double(), residual.double(), wide, _EPS)
    dx, dweight = norm_reference.backward(dout.double(), dstream.double(), residual.double(), wide, _EPS)
    return found, [*outputs, dx, dx, dweight]


def _drawing(device: torch.device) -> Callable[..., Tensor]:
    """Return a function that draws tensors, the same ones everywhere."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return draw
