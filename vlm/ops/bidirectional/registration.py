"""``vlm::bi_scan``: both directions' scans, their sum and one gate in one operator, channels-last.

B and C come as one tensor ``bc`` (b, l, 2n), a view into the rows [dt | B | C] as the projection left them,
so nothing is copied; a kernel reads them by strides. The reverse direction is an index, no tensor is flipped.

With a weight (e, r) a direction's ``delta`` is the rows dt (b, l, r) of the same projection, and the operator
multiplies: rows @ weight^T. The CUDA kernels then never write delta (b, l, e) at all; the gradient keeps no
copy of it either.
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
    "Tensor A_f, Tensor? A_b, Tensor D_f, Tensor? D_b, Tensor? bias_f, Tensor? bias_b, "
    "Tensor? weight_f, Tensor? weight_b, Tensor? segments"
)
# where each direction's tensors stand among the operator's arguments: u, delta, bc, A, D, bias, weight
_FORWARD = (0, 3, 5, 7, 9, 11, 13)
_BACKWARD = (1, 4, 6, 8, 10, 12, 14)
_NUM_DIFFERENTIABLE, _SEGMENTS, _SAVE = 15, 15, 16


def _scans(inputs: tuple[Any, ...], stored: torch.dtype, *, in_rows: bool = False) -> list[Scan]:
    """Return one scan for each direction present: sequences in ``stored``, parameters as the sums are.

    ``in_rows``: where there is a weight, delta stays as rank rows.
    """
    dtype = wide(inputs[0].dtype)
    scans = []
    for places, reverse in ((_FORWARD, False), (_BACKWARD, True)):
        if inputs[places[0]] is None:
            continue
        delta, weight = inputs[places[1]], inputs[places[6]]
        if weight is not None and not in_rows:
            delta = torch.nn.functional.linear(delta, weight.to(delta.dtype))
        u, delta, bc = (x.to(stored) for x in (inputs[places[0]], delta, inputs[places[2]]))
        A, D = (inputs[i].to(dtype) for i in places[3:5])
        bias = None if inputs[places[5]] is None else inputs[places[5]].to(dtype)
        B, C = bc.unsqueeze(2).chunk(2, -1)
        scans.append(Scan(u, delta, A, B, C, D, bias, None, inputs[_SEGMENTS], True, reverse))
    return scans


def _for_cuda(
    which: str, inputs: tuple[Any, ...], *others: Tensor
) -> tuple[list[Scan], Tensor, list[Tensor]] | None:
    """Return scans and gate for the CUDA kernels, and weights if they multiply; None if they do not serve.

    ``others`` are the sequences that they get besides.
    """
    if which != "cuda":
        return None
    dtype = inputs[0].dtype
    z = inputs[2].to(dtype)
    scans = _scans(inputs, dtype, in_rows=True)
    if not scan_calls.serves(scans[0]):
        return None
    weights = [inputs[places[6]] for places in (_FORWARD, _BACKWARD) if inputs[places[0]] is not None]
    if all(weight is None for weight in weights):
        return scans, z, []
    if all(weight is not None for weight in weights):
        weights = [weight.to(dtype).contiguous() for weight in weights]
        if scan_calls.takes_rank_rows(scans, weights, z, *others):
            return scans, z, weights
    return _scans(inputs, dtype), z, []


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
    if served := _for_cuda(which, tuple(inputs)):
        scans, z, weights = served
        return scan_calls.bi_scan_forward(scans, z, weights, save=save)
    run = {"reference": reference.forward, "mamba_ssm": mamba_ssm_forward}.get(which, chunked.forward)
    dtype = wide(u.dtype)
    stored = u.dtype if which == "mamba_ssm" else dtype
    results = [run(s, save=save) for s in _scans(tuple(inputs), stored)]
    total = torch.stack([y for y, _, _ in results]).sum(0)
    out = (total * torch.nn.functional.silu(z.to(dtype))).to(u.dtype)
    if not save:
        return out, u.new_empty(0), total.new_empty(0)
    return out, total.to(u.dtype), torch.stack([kept for _, _, kept in results])


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``_forward``."""
    u, u_b, A, save = arguments[0], arguments[1], arguments[7], arguments[_SAVE]
    batch, length, channels = u.shape
    dtype = wide(u.dtype)
    if not save:
        return u.new_empty(u.shape), u.new_empty(0), u.new_empty(0, dtype=dtype)
    shape = (1 if u_b is None else 2, batch, num_checkpoints(length), A.shape[1], channels)
    return u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(shape, dtype=dtype)


def _backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the first fifteen arguments; empty where one was None."""
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
    elif served := _for_cuda(which, tuple(inputs), dout, total):
        scans, z, weights = served
        results, joined, dz = scan_gradients.bi_scan_backward(dout, scans, z, weights, total, kept)
    else:
        scans = _scans(tuple(inputs), u.dtype if which == "mamba_ssm" else dtype)
        dy, dz = silu_backward(dout.to(dtype), total.to(dtype), z.to(dtype))
        if which == "reference":
            results = [reference.backward(dy, s) for s in scans]
        elif which == "mamba_ssm":
            results = [mamba_ssm_backward(dy, s) for s in scans]
        else:
            results = [chunked.backward(dy, s, kept[i]) for i, s in enumerate(scans)]
        joined = [torch.cat([g.B, g.C], -1).squeeze(2) for g in results]
    gradients: list[Tensor | None] = [None] * _NUM_DIFFERENTIABLE
    gradients[2] = dz
    for g, bc, places in zip(results, joined, (_FORWARD, _BACKWARD), strict=False):
        ddelta, dweight = _through_weight(g.delta, inputs[places[1]], inputs[places[6]])
        for place, value in zip(places, (g.u, ddelta, bc, g.A, g.D, g.bias, dweight), strict=True):
            gradients[place] = value
    return tuple(
        u.new_empty(0) if x is None or g is None else g.to(x.dtype).contiguous()
        for g, x in zip(gradients, inputs[:_NUM_DIFFERENTIABLE], strict=True)
    )


def _through_weight(ddelta: Tensor, rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of what came as ``delta`` and of the weight that multiplied it."""
    if weight is None:
        return ddelta, None
    ddelta = ddelta.to(rows.dtype)
    return ddelta @ weight.to(rows.dtype), ddelta.flatten(0, 1).t() @ rows.flatten(0, 1)


def _backward_fake(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Shapes and dtypes of ``_backward``."""
    return tuple(
        dout.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs[:_NUM_DIFFERENTIABLE]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs, the ungated sum and the states for the backward pass."""
    _, total, kept = output
    ctx.save_for_backward(*inputs[:_SAVE], total, kept)
    ctx.saved_states = inputs[_SAVE]
    ctx.mark_non_differentiable(total, kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of the operator."""
    if dout is None:
        return (None,) * (_SAVE + 1)
    if not ctx.saved_states:
        raise RuntimeError("vlm::bi_scan ran with save=False; call vlm.ops.bidirectional_mamba instead")
    inputs = ctx.saved_tensors
    gradients = torch.ops.vlm.bi_scan_backward(dout.contiguous(), *inputs)
    present = [None if x is None else g for x, g in zip(inputs[:_NUM_DIFFERENTIABLE], gradients, strict=True)]
    return (*present, None, None)


register(f"bi_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
register(
    f"bi_scan_backward(Tensor dout, {_ARGUMENTS}, Tensor total, Tensor kept) -> ("
    + ", ".join(["Tensor"] * _NUM_DIFFERENTIABLE)
    + ")",
    _backward,
    _backward_fake,
)
register_autograd("bi_scan", _setup_context, _autograd)
