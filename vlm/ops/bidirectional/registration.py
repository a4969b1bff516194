"""``vlm::bi_scan``: both directions' scans, their sum and one gate in one operator, channels-last.

B and C come as one tensor ``bc`` (b, l, 2n), a view into the rows [dt | B | C] as the projection left them,
so nothing is copied; a kernel reads them by strides. The reverse direction is an index, no tensor is flipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.ops import cpu_calls, cpu_library
from vlm.ops.backends import backend
from vlm.ops.cuda import scan_calls, scan_gradients
from vlm.ops.library import register, register_autograd
from vlm.ops.selective_scan import chunked, reference
from vlm.ops.selective_scan.reference import Scan, ScanGradients, num_checkpoints
from vlm.ops.selective_scan.registration import (
    mamba_ssm_backward,
    mamba_ssm_forward,
    silu_backward,
    wide,
)

_ARGUMENTS = (
    "Tensor u_f, Tensor? u_b, Tensor z, Tensor delta_f, Tensor? delta_b, Tensor bc_f, Tensor? bc_b, "
    "Tensor A_f, Tensor? A_b, Tensor D_f, Tensor? D_b, Tensor? bias_f, Tensor? bias_b, Tensor? segments"
)
# where each direction's tensors stand among the operator's arguments: u, delta, bc, A, D, bias
_FORWARD = (0, 3, 5, 7, 9, 11)
_BACKWARD = (1, 4, 6, 8, 10, 12)


def _scans(inputs: tuple[Any, ...], stored: torch.dtype) -> list[Scan]:
    """Return one scan for each direction present: sequences in ``stored``, parameters as the sums are."""
    dtype = wide(inputs[0].dtype)
    scans = []
    for places, reverse in ((_FORWARD, False), (_BACKWARD, True)):
        if inputs[places[0]] is None:
            continue
        u, delta, bc = (inputs[i].to(stored) for i in places[:3])
        A, D = (inputs[i].to(dtype) for i in places[3:5])
        bias = None if inputs[places[5]] is None else inputs[places[5]].to(dtype)
        B, C = bc.unsqueeze(2).chunk(2, -1)
        scans.append(Scan(u, delta, A, B, C, D, bias, None, inputs[13], True, reverse))
    return scans


def _stored(inputs: list[Any]) -> torch.dtype:
    """Return what the C++ kernels take the sequences u, z, delta and bc in."""
    return cpu_calls.stored_dtype(*inputs[:7])


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated sum (b, l, e) and, if saved, the sum before the gate and the kept states."""
    *inputs, save = arguments
    u, z = inputs[0], inputs[2]
    which = backend("bi_scan", u.device, u.dtype)
    if which == "cpu" and cpu_library.fits(inputs[7].shape[1]):
        stored = _stored(inputs)
        scans = _scans(tuple(inputs), stored)
        out, total, kept = cpu_calls.bi_scan_forward(scans, z.to(stored), save=save)
        return out.to(u.dtype), total.to(u.dtype), kept
    if which == "cuda":
        scans = _scans(tuple(inputs), u.dtype)
        if scan_calls.serves(scans[0]):
            return scan_calls.bi_scan_forward(scans, z.to(u.dtype), save=save)
    run = {"reference": reference.forward, "mamba_ssm": mamba_ssm_forward}.get(which, chunked.forward)
    dtype = wide(u.dtype)
    results = [run(s, save=save) for s in _scans(tuple(inputs), dtype)]
    total = torch.stack([y for y, _, _ in results]).sum(0)
    out = (total * torch.nn.functional.silu(z.to(dtype))).to(u.dtype)
    if not save:
        return out, u.new_empty(0), total.new_empty(0)
    return out, total.to(u.dtype), torch.stack([kept for _, _, kept in results])


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``_forward``."""
    u, u_b, A, save = arguments[0], arguments[1], arguments[7], arguments[14]
    batch, length, channels = u.shape
    dtype = wide(u.dtype)
    if not save:
        return u.new_empty(u.shape), u.new_empty(0), u.new_empty(0, dtype=dtype)
    shape = (1 if u_b is None else 2, batch, num_checkpoints(length), A.shape[1], channels)
    return u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(shape, dtype=dtype)


def _backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the first thirteen arguments; empty where one was None."""
    *inputs, total, kept = arguments
    u, z = inputs[0], inputs[2]
    dtype = wide(u.dtype)
    which = backend("bi_scan", u.device, u.dtype)
    results: list[ScanGradients]
    if which == "cpu" and cpu_library.fits(inputs[7].shape[1]):
        stored = _stored(inputs)
        scans = _scans(tuple(inputs), stored)
        results, joined, dz = cpu_calls.bi_scan_backward(
            dout.to(stored), scans, z.to(stored), total.to(stored), kept
        )
    elif which == "cuda" and scan_calls.serves((scans := _scans(tuple(inputs), u.dtype))[0]):
        results, joined, dz = scan_gradients.bi_scan_backward(dout, scans, z.to(u.dtype), total, kept)
    else:
        scans = _scans(tuple(inputs), dtype)
        dy, dz = silu_backward(dout.to(dtype), total.to(dtype), z.to(dtype))
        if which == "reference":
            results = [reference.backward(dy, s) for s in scans]
        elif which == "mamba_ssm":
            results = [mamba_ssm_backward(dy, s) for s in scans]
        else:
            results = [chunked.backward(dy, s, kept[i]) for i, s in enumerate(scans)]
        joined = [torch.cat([g.B, g.C], -1).squeeze(2) for g in results]
    gradients: list[Tensor | None] = [None] * 13
    gradients[2] = dz
    for g, bc, places in zip(results, joined, (_FORWARD, _BACKWARD), strict=False):
        for place, value in zip(places, (g.u, g.delta, bc, g.A, g.D, g.bias), strict=True):
            gradients[place] = value
    return tuple(
        u.new_empty(0) if x is None or g is None else g.to(x.dtype).contiguous()
        for g, x in zip(gradients, inputs[:13], strict=True)
    )


def _backward_fake(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Shapes and dtypes of ``_backward``."""
    return tuple(
        dout.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs[:13]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs, the ungated sum and the states for the backward pass."""
    _, total, kept = output
    ctx.save_for_backward(*inputs[:14], total, kept)
    ctx.saved_states = inputs[14]
    ctx.mark_non_differentiable(total, kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of the operator."""
    if dout is None:
        return (None,) * 15
    if not ctx.saved_states:
        raise RuntimeError("vlm::bi_scan ran with save=False; call vlm.ops.bidirectional_mamba instead")
    inputs = ctx.saved_tensors
    gradients = torch.ops.vlm.bi_scan_backward(dout.contiguous(), *inputs)
    return (*(None if x is None else g for x, g in zip(inputs[:13], gradients, strict=True)), None, None)


register(f"bi_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
register(
    f"bi_scan_backward(Tensor dout, {_ARGUMENTS}, Tensor total, Tensor kept) -> ("
    + ", ".join(["Tensor"] * 13)
    + ")",
    _backward,
    _backward_fake,
)
register_autograd("bi_scan", _setup_context, _autograd)
