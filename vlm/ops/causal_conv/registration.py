"""``vlm::conv2`` for PyTorch's dispatcher: both directions' convolution and SiLU in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.ops import cpu_calls, cpu_library
from vlm.ops.backends import backend
from vlm.ops.causal_conv import reference
from vlm.ops.cuda import conv_calls
from vlm.ops.library import register, register_autograd

_ARGUMENTS = "Tensor x, Tensor weight_f, Tensor? bias_f, Tensor? weight_b, Tensor? bias_b, Tensor? segments"


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``x`` in the dtype that the sums have."""
    return None if x is None else x.to(dtype)


def _forward(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return both directions' outputs; the second is empty without ``weight_b``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    which, taps = backend("conv2", x.device, x.dtype), weight_f.shape[1]
    if which == "cuda" and conv_calls.serves(x, taps):
        return conv_calls.conv2_forward(x, weight_f, bias_f, weight_b, bias_b, segments)
    if which == "cpu" and taps <= cpu_library.MAX_TAPS:
        u_f, u_b = cpu_calls.conv2_forward(
            x.to(cpu_calls.stored_dtype(x)),
            weight_f.to(dtype),
            _wide(bias_f, dtype),
            _wide(weight_b, dtype),
            _wide(bias_b, dtype),
            segments,
        )
        return u_f.to(x.dtype), u_b.to(x.dtype)
    out, wide = [], x.to(dtype)
    for weight, bias, anticausal in ((weight_f, bias_f, False), (weight_b, bias_b, True)):
        if weight is None:
            out.append(x.new_empty(0))
            continue
        u = reference.forward(wide, weight.to(dtype), _wide(bias, dtype), segments, anticausal=anticausal)
        out.append(u.to(x.dtype).contiguous())
    return out[0], out[1]


def _forward_fake(x: Tensor, weight_f: Tensor, bias_f: Any, weight_b: Any, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes of ``_forward``."""
    return x.new_empty(x.shape), x.new_empty(x.shape if weight_b is not None else 0)


def _backward(
    du_f: Tensor | None,
    du_b: Tensor | None,
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return dx, dweight_f, dbias_f, dweight_b, dbias_b; empty where the input was None."""
    which, taps = backend("conv2", x.device, x.dtype), weight_f.shape[1]
    gradients: list[Tensor | None]
    if which == "cuda" and conv_calls.serves(x, taps):
        gradients = conv_calls.conv2_backward(du_f, du_b, x, weight_f, bias_f, weight_b, bias_b, segments)
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        on_cpu = which == "cpu" and taps <= cpu_library.MAX_TAPS
        wide = x.to(cpu_calls.stored_dtype(x) if on_cpu else dtype)
        du_f = torch.zeros_like(wide) if du_f is None else du_f.to(wide.dtype)
        if weight_b is not None:
            du_b = torch.zeros_like(wide) if du_b is None else du_b.to(wide.dtype)
        compute = cpu_calls.conv2_backward if on_cpu else _by_definition
        gradients = compute(
            du_f,
            du_b,
            wide,
            weight_f.to(dtype),
            _wide(bias_f, dtype),
            _wide(weight_b, dtype),
            _wide(bias_b, dtype),
            segments,
        )
    likes = (x, weight_f, bias_f, weight_b, bias_b)
    return tuple(
        x.new_empty(0) if like is None or g is None else g.to(like.dtype).contiguous()
        for g, like in zip(gradients, likes, strict=True)
    )


def _by_definition(
    du_f: Tensor,
    du_b: Tensor | None,
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> list[Tensor | None]:
    """Return what ``_backward`` does, in plain PyTorch; None where the input was None."""
    dx, dweight_f, dbias_f = reference.backward(du_f, x, weight_f, bias_f, segments, anticausal=False)
    if weight_b is None or du_b is None:
        return [dx, dweight_f, dbias_f, None, None]
    part, dweight_b, dbias_b = reference.backward(du_b, x, weight_b, bias_b, segments, anticausal=True)
    return [dx + part, dweight_f, dbias_f, dweight_b, dbias_b]


def _backward_fake(du_f: Any, du_b: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """Shapes of ``_backward``."""
    x = inputs[0]
    return tuple(
        x.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
        for y in inputs[:5]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs; the convolution is recomputed in the backward pass."""
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, du_f: Tensor | None, du_b: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of the operator."""
    inputs = ctx.saved_tensors
    if du_f is None and du_b is None:
        return (None,) * 6
    if inputs[3] is None:
        du_b = None
    gradients = torch.ops.vlm.conv2_backward(du_f, du_b, *inputs)
    return (*(None if x is None else g for x, g in zip(inputs[:5], gradients, strict=True)), None)


register(f"conv2({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
register(
    f"conv2_backward(Tensor? du_f, Tensor? du_b, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_autograd("conv2", _setup_context, _autograd)
