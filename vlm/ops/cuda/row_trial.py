"""One trial of the CUDA convolution and norm on each device before they are trusted: against fp64, small."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vlm.errors import KernelError
from vlm.ops.causal_conv import reference as conv_reference
from vlm.ops.cuda import conv_calls, norm_calls
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.trial import LIMITS
from vlm.ops.norm import reference as norm_reference

_BATCH, _LENGTH, _WIDTH, _TAPS = 2, 75, 192, 4
_EPS = 1e-5
_LOG = logging.getLogger(__name__)
_tried: dict[tuple[str, torch.device, torch.dtype], bool] = {}


def trusted(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the CUDA kernels of ``op`` serve ``dtype`` on ``device`` and give right numbers there.

    A disagreement is logged once, as a warning: results stay right, but slower than they should be. While a
    stream is captured nothing is tried, because a trial waits for the GPU; what was not tried before is not
    trusted then.
    """
    known = _tried.get((op, device, dtype))
    if known is not None:
        return known
    if dtype not in LIMITS or not cuda_library.available(device):
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    _tried[op, device, dtype] = _agrees(op, device, dtype)
    return _tried[op, device, dtype]


def forget() -> None:
    """Forget all trials."""
    _tried.clear()


def disagreement(op: str, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of an operator's outputs and gradients against fp64."""
    found, expected = _TRIALS[op](device, dtype)
    errors = [
        float((mine.double() - truth).norm() / truth.norm())
        for mine, truth in zip(found, expected, strict=True)
    ]
    return max(errors)


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


def _conv2(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the kernels compute, and the truth."""
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


def _add_rms_norm(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the kernels compute, and the truth."""
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


_TRIALS = {"conv2": _conv2, "add_rms_norm": _add_rms_norm}
