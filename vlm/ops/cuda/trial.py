"""One trial of the CUDA scan on each device before it is trusted: against PyTorch, on a small problem."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from vlm.errors import KernelError
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import scan_calls, scan_gradients
from vlm.ops.cuda.registry import SCAN_RANKS
from vlm.ops.selective_scan import chunked
from vlm.ops.selective_scan.reference import Scan, ScanGradients
from vlm.ops.selective_scan.registration import silu_backward

# relative to the norm: what rounding the result leaves, several times over
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_BATCH, _LENGTH, _CHANNELS, _STATES = 2, 75, 64, 16
_LOG = logging.getLogger(__name__)


@functools.cache
def trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the CUDA scan serves ``dtype`` on ``device`` and gives PyTorch's numbers there.

    A disagreement is logged once, as a warning: results stay right, but slower than they should be.
    """
    if dtype not in LIMITS or not cuda_library.available(device):
        return False
    try:
        error = disagreement(device, dtype)
    except (KernelError, RuntimeError) as problem:
        _LOG.warning("the CUDA scan failed its trial on %s in %s: %s; PyTorch serves", device, dtype, problem)
        return False
    if not error <= LIMITS[dtype]:
        _LOG.warning(
            "the CUDA scan is off by %.1e on %s in %s; PyTorch serves, report this", error, device, dtype
        )
        return False
    return True


def disagreement(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error against the chunked implementation.

    Compared are the output, the sum before the gate, the kept states and all gradients; of half types also
    where the kernels multiply rank rows themselves.
    """
    ranks = (0,) if dtype == torch.float32 else (0, SCAN_RANKS[0])
    errors = [error for rank in ranks for error in _errors(device, dtype, rank)]
    # a NaN anywhere must not be lost in a maximum
    return max(errors) if all(error == error for error in errors) else float("nan")


def _errors(device: torch.device, dtype: torch.dtype, rank: int) -> list[float]:
    """Return the relative errors of one problem's results."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    scans = []
    for reverse in (False, True):
        u, delta = (
            draw(_BATCH, _LENGTH, _CHANNELS).to(dtype),
            draw(_BATCH, _LENGTH, rank or _CHANNELS).to(dtype),
        )
        B, C = (draw(_BATCH, _LENGTH, 1, _STATES).to(dtype) for _ in range(2))
        A, D, bias = -draw(_CHANNELS, _STATES).abs() - 0.1, draw(_CHANNELS), draw(_CHANNELS)
        scans.append(Scan(u, delta, A, B, C, D, bias, None, None, True, reverse))
    z, dout = (draw(_BATCH, _LENGTH, _CHANNELS).to(dtype) for _ in range(2))
    weights = [(draw(_CHANNELS, rank) / rank**0.5).to(dtype) for _ in scans if rank]
    pairs = zip(_by_kernels(scans, z, weights, dout), _by_pytorch(scans, z, weights, dout), strict=True)
    return [float((mine.float() - truth).norm() / truth.norm()) for mine, truth in pairs]


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
