"""One trial of the CUDA scan on each device before it is trusted: against PyTorch, on a small problem."""

from __future__ import annotations

import functools
import logging

import torch

from vlm.errors import KernelError
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import scan_calls
from vlm.ops.selective_scan import chunked
from vlm.ops.selective_scan.reference import Scan

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
    """Return the largest relative error of output, sum and kept states against the chunked implementation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    scans = []
    for reverse in (False, True):
        u, delta = (draw(_BATCH, _LENGTH, _CHANNELS).to(dtype) for _ in range(2))
        B, C = (draw(_BATCH, _LENGTH, 1, _STATES).to(dtype) for _ in range(2))
        A, D, bias = -draw(_CHANNELS, _STATES).abs() - 0.1, draw(_CHANNELS), draw(_CHANNELS)
        scans.append(Scan(u, delta, A, B, C, D, bias, None, None, True, reverse))
    z = draw(_BATCH, _LENGTH, _CHANNELS).to(dtype)
    found = scan_calls.bi_scan_forward(scans, z, save=True)
    singles = [s._replace(u=s.u.float(), delta=s.delta.float(), B=s.B.float(), C=s.C.float()) for s in scans]
    parts = [chunked.forward(s, save=True) for s in singles]
    total = parts[0][0] + parts[1][0]
    expected = (total * torch.nn.functional.silu(z.float()), total, torch.stack([part[2] for part in parts]))
    errors = [
        float((mine.float() - truth).norm() / truth.norm())
        for mine, truth in zip(found, expected, strict=True)
    ]
    return max(errors)
