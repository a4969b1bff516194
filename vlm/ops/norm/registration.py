"""``vlm::add_rms_norm`` for PyTorch's dispatcher: the addition to the residual stream and its norm in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.ops.backends import backend
from vlm.ops.cuda import norm_calls
from vlm.ops.library import register, register_autograd
from vlm.ops.norm import reference


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum in the dtype of ``x``, and the sum, at least in fp32."""
    is_narrow = reference.wide(x, residual) == torch.float32
    if backend("add_rms_norm", x.device, x.dtype) == "cuda" and is_narrow and norm_calls.serves(x):
        return norm_calls.add_rms_norm_forward(x, residual, weight, eps)
    return reference.forward(x, residual, weight, eps)


def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of ``_forward``."""
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=reference.wide(x, residual))


def _backward(
    dout: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum's gradient in the dtype of ``dout``; if ``both``, in that of ``stream``; dweight."""
    is_narrow = stream.dtype == torch.float32
    if backend("add_rms_norm", dout.device, dout.dtype) == "cuda" and is_narrow and norm_calls.serves(dout):
        dx, wide, dweight = norm_calls.add_rms_norm_backward(dout, dstream, stream, weight, eps, both=both)
    else:
        wide, dweight = reference.backward(dout, dstream, stream, weight, eps)
        dx = wide.to(dout.dtype, copy=both)
    return dx, wide if both else stream.new_empty(0), dweight.to(weight.dtype)


def _backward_fake(
    dout: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``_backward``."""
    wide = stream.new_empty(stream.shape if both else 0)
    return dout.new_empty(dout.shape), wide, weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the sum and the weight; the root mean square is computed again."""
    x, residual, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of the operator."""
    stream, weight = ctx.saved_tensors
    dweight = None
    if dout is None:
        dx = dresidual = dstream
    else:
        both = ctx.residual_dtype is not None and ctx.dtype != stream.dtype
        dx, dresidual, dweight = torch.ops.vlm.add_rms_norm_backward(
            dout, dstream, stream, weight, ctx.eps, both
        )
        dresidual = dresidual if both else dx
    if dx is None or dresidual is None:
        return (None,) * 4
    dresidual = None if ctx.residual_dtype is None else dresidual.to(ctx.residual_dtype)
    return dx.to(ctx.dtype), dresidual, dweight, None


register(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "add_rms_norm_backward(Tensor dout, Tensor? dstream, Tensor stream, Tensor weight, float eps, bool both) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_autograd("add_rms_norm", _setup_context, _autograd)
