"""``vlm::selective_scan`` for PyTorch's dispatcher: schema, shapes, gradient, choice of the backend.

At this boundary tensors have mamba-ssm's layout; inside, the scans are channels-last and at least fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.ops import cpu_calls, cpu_library
from vlm.ops.backends import backend, mamba_ssm_extension
from vlm.ops.cuda import scan_calls, scan_gradients
from vlm.ops.library import register, register_autograd
from vlm.ops.selective_scan import chunked, reference
from vlm.ops.selective_scan.reference import Scan, num_checkpoints

_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? segments, bool delta_softplus, bool reverse"
)
_OPTIONAL = (5, 6, 7, 8)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that states and sums have: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def silu_backward(gradient: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``ungated * silu(z)`` with respect to both factors."""
    gate = torch.sigmoid(z)
    return gradient * z * gate, gradient * ungated * (gate * (1 + z * (1 - gate)))


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, stored: torch.dtype | None = None
) -> Scan:
    """Bring the operator's arguments into the layout of the implementations; sequences in ``stored``."""
    D, bias, initial, segments, softplus, reverse = rest
    dtype = wide(u.dtype)

    def last(x: Tensor) -> Tensor:
        return x.movedim(-1, 1).to(stored or dtype).contiguous()

    def same(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    A = A.to(dtype).contiguous()
    return Scan(
        last(u),
        last(delta),
        A,
        last(B),
        last(C),
        same(D),
        same(bias),
        same(initial),
        segments,
        softplus,
        reverse,
    )


def _time_last(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, *rest: Any
) -> tuple[Scan, Tensor | None]:
    """Return channels-last views of the operator's arguments, in the dtypes of the C++ kernels; no copy."""
    dtype = wide(u.dtype)
    stored = cpu_calls.stored_dtype(u, delta, B, C, z)
    D, bias, initial = (None if x is None else x.to(dtype) for x in rest[:3])
    u, delta, B, C = (x.to(stored).movedim(-1, 1) for x in (u, delta, B, C))
    scan = Scan(u, delta, A.to(dtype), B, C, D, bias, initial, *rest[3:])
    return scan, None if z is None else z.to(stored).movedim(-1, 1)


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the scan on the chosen backend: out, ungated output (if saved and gated), last state, states."""
    which = backend("selective_scan", u.device, u.dtype)
    rest = (D, delta_bias, initial_state, segments, delta_softplus, reverse)
    if which == "cpu" and cpu_library.fits(A.shape[1]):
        s, gate = _time_last(u, delta, A, B, C, z, *rest)
        out, last, ungated, kept = cpu_calls.scan_forward(s, gate, save=save)
        return out.to(u.dtype), last, ungated.to(u.dtype), kept
    s = _scan(u, delta, A, B, C, *rest, stored=_stored(which, u))
    if which == "cuda" and scan_calls.serves(s):
        y, last, kept = scan_calls.scan_forward(s, save=save)
    elif which == "reference":
        y, last, kept = reference.forward(s, save=save)
    elif which == "mamba_ssm":
        y, last, kept = mamba_ssm_forward(s, save=save)
    else:
        y, last, kept = chunked.forward(s, save=save)
    y = y.transpose(1, 2)
    if z is None:
        return y.to(u.dtype).contiguous(), last, u.new_empty(0), kept
    out = (y * torch.nn.functional.silu(z.to(y.dtype))).to(u.dtype).contiguous()
    ungated = y.to(u.dtype).contiguous() if save else u.new_empty(0)
    return out, last, ungated, kept


def _forward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``_forward``."""
    z, save = rest[1], rest[7]
    batch, channels, length = u.shape
    dtype, num_states = wide(u.dtype), A.shape[1]
    return (
        u.new_empty(batch, channels, length),
        u.new_empty(batch, channels, num_states, dtype=dtype),
        u.new_empty(batch, channels, length) if save and z is not None else u.new_empty(0),
        u.new_empty(batch, num_checkpoints(length), num_states, channels, dtype=dtype)
        if save
        else u.new_empty(0, dtype=dtype),
    )


def _backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    ungated: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial; empty where the input was None."""
    which = backend("selective_scan", u.device, u.dtype)
    rest = (D, delta_bias, initial_state, segments, delta_softplus, reverse)
    likes = (u, delta, A, B, C, D, delta_bias, initial_state)
    dz = u.new_empty(0)
    if which == "cpu" and cpu_library.fits(A.shape[1]):
        s, gate = _time_last(u, delta, A, B, C, z, *rest)
        g, dgate = cpu_calls.scan_backward(dout.to(s.u.dtype), s, gate, ungated.to(s.u.dtype), kept)
        return _gradients(g, dz if dgate is None else dgate.to(u.dtype), likes)
    s = _scan(u, delta, A, B, C, *rest, stored=_stored(which, u))
    dy = dout.to(wide(u.dtype))
    if z is not None:
        dy, gate_gradient = silu_backward(dy, ungated.to(dy.dtype), z.to(dy.dtype))
        dz = gate_gradient.to(z.dtype).contiguous()
    dy = dy.transpose(1, 2).contiguous()
    if which == "cuda" and scan_calls.serves(s):
        g = scan_gradients.scan_backward(dy, s, kept)
    elif which == "reference":
        g = reference.backward(dy, s)
    elif which == "mamba_ssm":
        g = mamba_ssm_backward(dy, s)
    else:
        g = chunked.backward(dy, s, kept)

    return _gradients(g, dz, likes)


def _gradients(g: reference.ScanGradients, dz: Tensor, likes: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Bring gradients into the layout and dtypes of the arguments, ``likes``; empty where one is None."""

    def sequence(x: Tensor, like: Tensor) -> Tensor:
        return x.movedim(1, -1).to(like.dtype).contiguous()

    def same(x: Tensor | None, like: Tensor | None) -> Tensor:
        return dz.new_empty(0) if x is None or like is None else x.to(like.dtype)

    u, delta, A, B, C, D, bias, initial = likes
    return (
        sequence(g.u, u),
        sequence(g.delta, delta),
        same(g.A, A),
        sequence(g.B, B),
        sequence(g.C, C),
        same(g.D, D),
        dz,
        same(g.bias, bias),
        same(g.initial, initial),
    )


def _backward_fake(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Shapes and dtypes of ``_backward``."""
    u = inputs[0]
    return tuple(
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs[:9]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs and what the forward pass left for the backward pass."""
    _, last, ungated, kept = output
    ctx.save_for_backward(*inputs[:10], ungated, kept)
    ctx.flags = inputs[10:12]
    ctx.saved_states = inputs[12]
    ctx.mark_non_differentiable(last, ungated, kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of the operator."""
    if dout is None:
        return (None,) * 13
    if not ctx.saved_states:
        raise RuntimeError("vlm::selective_scan ran with save=False; call vlm.ops.selective_scan instead")
    *inputs, ungated, kept = ctx.saved_tensors
    gradients = torch.ops.vlm.selective_scan_backward(dout, *inputs, *ctx.flags, ungated, kept)
    present = [None if x is None else g for x, g in zip(inputs[:9], gradients, strict=True)]
    return (*present, None, None, None, None)


def _stored(which: str, u: Tensor) -> torch.dtype | None:
    """Return the dtype that a backend takes sequences in: mamba-ssm as they are, others as the sums are."""
    return u.dtype if which == "mamba_ssm" else None


def _mamba_ssm_arguments(s: Scan) -> tuple[Any, ...]:
    """Return the arguments that mamba-ssm's extension takes, flipped for the reverse direction."""
    if s.initial is not None or s.segments is not None:
        from vlm.errors import KernelError

        raise KernelError(
            "mamba_ssm has no initial_state or segment_starts; set VLM_SCAN_BACKEND=auto or drop the argument"
        )

    def first(x: Tensor) -> Tensor:
        return (x.flip(1) if s.reverse else x).movedim(1, -1).contiguous()

    return first(s.u), first(s.delta), s.A, first(s.B), first(s.C), s.D, None, s.bias


def mamba_ssm_forward(s: Scan, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run mamba-ssm's forward kernel; it keeps its own states, so ours stay zero."""
    out, states, *_ = mamba_ssm_extension().fwd(*_mamba_ssm_arguments(s), s.softplus)
    shape = (s.u.shape[0], num_checkpoints(s.u.shape[1]), s.A.shape[1], s.u.shape[2])
    y = out.transpose(1, 2).to(s.A.dtype)
    return (
        y.flip(1) if s.reverse else y,
        states[:, :, -1, 1::2].contiguous(),
        s.A.new_zeros(shape) if save else s.A.new_empty(0),
    )


def mamba_ssm_backward(dy: Tensor, s: Scan) -> reference.ScanGradients:
    """Run mamba-ssm's backward kernel after its forward kernel, whose states it needs."""
    arguments = _mamba_ssm_arguments(s)
    extension = mamba_ssm_extension()
    out, states, *_ = extension.fwd(*arguments, s.softplus)
    dout = (dy.flip(1) if s.reverse else dy).transpose(1, 2).to(s.u.dtype).contiguous()
    du, ddelta, dA, dB, dC, dD, dbias, *_ = extension.bwd(
        *arguments, dout, states, out, None, s.softplus, False
    )

    def last(x: Tensor) -> Tensor:
        x = x.movedim(-1, 1)
        return x.flip(1) if s.reverse else x

    return reference.ScanGradients(
        last(du),
        last(ddelta),
        dA,
        last(dB),
        last(dC),
        None if s.D is None else dD,
        None if s.bias is None else dbias,
        None,
    )


register(
    f"selective_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake
)
register(
    f"selective_scan_backward(Tensor dout, {_ARGUMENTS}, Tensor ungated, Tensor kept) -> ("
    + ", ".join(["Tensor"] * 9)
    + ")",
    _backward,
    _backward_fake,
)
register_autograd("selective_scan", _setup_context, _autograd)
