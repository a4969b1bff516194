"""One trial of each CUDA operator on each device before it is trusted, on a small problem."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from vlm.errors import KernelError
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import trial_problems
from vlm.ops.cuda.arguments import allows_tf32

# relative to the norm: what rounding the result leaves, several times over
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_PROBLEMS: dict[str, Callable[[torch.device, torch.dtype], trial_problems.Results]] = {
    "selective_scan": trial_problems.scan,
    "bi_scan": trial_problems.scan,
    "conv2": trial_problems.convolution,
    "add_rms_norm": trial_problems.residual_norm,
}
_LOG = logging.getLogger(__name__)
# by problem, so that operators of one engine share a trial; the last says whether products may be in tf32
_tried: dict[tuple[object, torch.device, torch.dtype, bool], bool] = {}


def trusted(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the CUDA kernels of ``op`` serve ``dtype`` on ``device`` and give right numbers there.

    A disagreement is logged once, as a warning: results stay right, but slower than they should be. While a
    stream is captured nothing is tried, because a trial waits for the GPU; what was not tried before is not
    trusted then.
    """
    key = _PROBLEMS[op], device, dtype, dtype == torch.float32 and allows_tf32()
    if key in _tried:
        return _tried[key]
    if dtype not in LIMITS or not cuda_library.available(device):
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    _tried[key] = _agrees(op, device, dtype)
    return _tried[key]


def forget() -> None:
    """Forget all trials."""
    _tried.clear()


def disagreement(op: str, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of an operator's outputs and gradients; NaN if any has one."""
    found, expected = _PROBLEMS[op](device, dtype)
    errors = [
        (mine.double() - truth.double()).norm() / truth.double().norm()
        for mine, truth in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def _agrees(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        error = disagreement(op, device, dtype)
    except (KernelError, RuntimeError) as problem:
        _LOG.warning(
            "the CUDA %s failed its trial on %s in %s: %s; PyTorch serves", op, device, dtype, problem
        )
        return False
    if not error <= LIMITS[dtype]:
        _LOG.warning(
            "the CUDA %s is off by %.1e on %s in %s; PyTorch serves, report this", op, error, device, dtype
        )
        return False
    return True
