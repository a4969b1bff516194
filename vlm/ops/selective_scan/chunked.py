"""The scan in vectorised PyTorch: runs everywhere, in any floating dtype, with bounded memory.

A sequence is cut into chunks of 32 steps. Several chunks and batch rows, as many as fit a memory budget, walk
their 32 steps at once from an empty state; then the true states are carried from chunk to chunk and added,
weighted by the product of decays so far. Only products of decays are formed, never quotients or exponentials
of differences, so nothing overflows that the plain recurrence would not. Letters as in ``reference``; k is
the step within a chunk, w the chunk, r the channels of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.ops.selective_scan.reference import CHECKPOINT_EVERY, Scan, ScanGradients, resets, step_size

# elements (b, w, k, e, n) of one working tensor; about seven are alive in the backward pass
_BUDGET = 1 << 19


class _Prepared(NamedTuple):
    """Inputs in scan order, padded to whole chunks and cut: (b, w, k, g, r) or (b, w, k, g, n)."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    drops: Tensor | None


def forward(s: Scan, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan; arguments and results as in ``reference.forward``."""
    batch, length, channels = s.u.shape
    groups, num_states = s.B.shape[2:]
    p = _prepare(s, step_size(s)[0])
    num_chunks = p.u.shape[1]
    y = torch.empty_like(p.u)
    starts = s.u.new_empty(batch, num_chunks, groups, channels // groups, num_states)
    last = s.u.new_empty(batch, groups, channels // groups, num_states)
    for rows, wave in _waves(batch, num_chunks, channels * num_states):
        for first in range(0, num_chunks, wave):
            part = (rows, slice(first, first + wave))
            decay, h = _decays_and_inputs(p, part)
            state = _state_before(s, rows, groups) if first == 0 else last[rows]
            starts[part], last[rows] = _carry_forward(decay, h, state)
            y[part] = torch.matmul(h, p.C[part].unsqueeze(-1)).squeeze(-1)
    y = _back_to_time(y, s)
    if s.D is not None:
        y = y + s.D * s.u
    kept = starts.flatten(2, 3).transpose(2, 3).contiguous() if save else s.u.new_empty(0)
    return y, last.flatten(1, 2), kept


def backward(dy: Tensor, s: Scan, checkpoints: Tensor) -> ScanGradients:
    """Return the gradients of sum(y * dy) from the states kept by ``forward``."""
    batch, _, channels = s.u.shape
    groups, num_states = s.B.shape[2:]
    dt, slope = step_size(s)
    p = _prepare(s, dt)
    dy_cut = _cut(dy, s.reverse, groups)
    starts = torch.unflatten(checkpoints.transpose(2, 3), 2, (groups, -1))
    num_chunks = p.u.shape[1]
    du, ddt = torch.empty_like(p.u), torch.empty_like(p.u)
    dB, dC = torch.empty_like(p.B), torch.empty_like(p.C)
    dA = torch.zeros_like(p.A)
    dinitial = s.u.new_empty(batch, groups, channels // groups, num_states)
    for rows, wave in _waves(batch, num_chunks, channels * num_states):
        carry = torch.zeros_like(dinitial[rows])
        for first in reversed(range(0, num_chunks, wave)):
            part = (rows, slice(first, first + wave))
            decay, h = _decays_and_inputs(p, part)
            before = _walk(decay, h, starts[part])
            dC[part] = torch.matmul(dy_cut[part].unsqueeze(-2), h).squeeze(-2)
            dh = dy_cut[part].unsqueeze(-1) * p.C[part].unsqueeze(-2)
            carry = _carry_backward(decay, dh, carry)
            along_b = torch.matmul(dh, p.B[part].unsqueeze(-1)).squeeze(-1)
            u, step = p.u[part], p.dt[part]
            dB[part] = torch.matmul((step * u).unsqueeze(-2), dh).squeeze(-2)
            through_decay = dh.mul_(decay).mul_(before)
            du[part] = along_b * step
            ddt[part] = along_b * u + (through_decay * p.A).sum(-1)
            dA += (through_decay * step.unsqueeze(-1)).sum((0, 1, 2))
        dinitial[rows] = carry
    ddelta = _back_to_time(ddt, s) * slope
    du_time = _back_to_time(du, s)
    return ScanGradients(
        u=du_time if s.D is None else du_time + dy * s.D,
        delta=ddelta,
        A=dA.flatten(0, 1),
        B=_back_to_time(dB, s, merge=False),
        C=_back_to_time(dC, s, merge=False),
        D=None if s.D is None else (dy * s.u).sum((0, 1)),
        bias=None if s.bias is None else ddelta.sum((0, 1)),
        initial=None if s.initial is None else dinitial.flatten(1, 2),
    )


def _waves(batch: int, num_chunks: int, size: int) -> Iterator[tuple[slice, int]]:
    """Yield groups of batch rows, each with the number of chunks to walk at once."""
    at_once = max(1, _BUDGET // (size * CHECKPOINT_EVERY))
    # a wave of one chunk needs no second pass over the states, so rows come before chunks
    rows = min(batch, at_once)
    wave = min(num_chunks, at_once // rows)
    for first in range(0, batch, rows):
        yield slice(first, min(first + rows, batch)), wave


def _decays_and_inputs(p: _Prepared, part: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    """Return exp(dt A) and dt u B of some chunks, (b, w, k, g, r, n)."""
    dt = p.dt[part].unsqueeze(-1)
    decay = (dt * p.A).exp_()
    if p.drops is not None:
        decay.masked_fill_(p.drops[part][..., None, None, None], 0)
    return decay, (dt * p.u[part].unsqueeze(-1)) * p.B[part].unsqueeze(-2)


def _walk(decay: Tensor, h: Tensor, starts: Tensor) -> Tensor:
    """Turn the inputs ``h`` into states in place, given each chunk's first state; return those before."""
    h[:, :, 0].addcmul_(decay[:, :, 0], starts)
    for k in range(1, h.shape[2]):
        h[:, :, k].addcmul_(decay[:, :, k], h[:, :, k - 1])
    return torch.cat([starts.unsqueeze(2), h[:, :, :-1]], 2)


def _carry_forward(decay: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Turn inputs into states in place; return each chunk's first state and the last one of all."""
    if h.shape[1] == 1:
        starts = state.unsqueeze(1).clone()
        _walk(decay, h, starts)
        return starts, h[:, -1, -1]
    for k in range(1, h.shape[2]):
        h[:, :, k].addcmul_(decay[:, :, k], h[:, :, k - 1])
        decay[:, :, k].mul_(decay[:, :, k - 1])
    firsts = []
    for w in range(h.shape[1]):
        firsts.append(state)
        state = torch.addcmul(h[:, w, -1], decay[:, w, -1], state)
    starts = torch.stack(firsts, 1)
    h.addcmul_(decay, starts.unsqueeze(2))
    return starts, state


def _carry_backward(decay: Tensor, dh: Tensor, carry: Tensor) -> Tensor:
    """Turn dy C into the gradients of the states in place; return what flows into the chunk before."""
    steps = dh.shape[2]
    if dh.shape[1] == 1:
        dh[:, 0, -1] += carry
        for k in range(steps - 2, -1, -1):
            dh[:, :, k].addcmul_(decay[:, :, k + 1], dh[:, :, k + 1])
        return decay[:, 0, 0] * dh[:, 0, 0]
    suffix = torch.ones_like(decay)
    for k in range(steps - 2, -1, -1):
        dh[:, :, k].addcmul_(decay[:, :, k + 1], dh[:, :, k + 1])
        torch.mul(decay[:, :, k + 1], suffix[:, :, k + 1], out=suffix[:, :, k])
    incoming = []
    for w in range(dh.shape[1] - 1, -1, -1):
        incoming.append(carry)
        carry = decay[:, w, 0] * torch.addcmul(dh[:, w, 0], suffix[:, w, 0], carry)
    dh.addcmul_(suffix, torch.stack(incoming[::-1], 1).unsqueeze(2))
    return carry


def _prepare(s: Scan, dt: Tensor) -> _Prepared:
    """Bring the inputs into scan order and cut them into chunks; padded steps leave the state alone."""
    groups = s.B.shape[2]
    drops = resets(s)
    return _Prepared(
        u=_cut(s.u, s.reverse, groups),
        dt=_cut(dt, s.reverse, groups),
        A=torch.unflatten(s.A, 0, (groups, -1)),
        B=_cut(s.B.flatten(2), s.reverse, groups),
        C=_cut(s.C.flatten(2), s.reverse, groups),
        drops=None if drops is None else _cut(drops.unsqueeze(-1), s.reverse, 1)[..., 0, 0],
    )


def _cut(x: Tensor, reverse: bool, groups: int) -> Tensor:
    """(b, l, g * r) in time order to (b, w, k, g, r) in scan order, zero-padded."""
    x = x.flip(1) if reverse else x
    missing = -x.shape[1] % CHECKPOINT_EVERY
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, x.shape[2])], 1)
    return torch.unflatten(torch.unflatten(x, 1, (-1, CHECKPOINT_EVERY)), 3, (groups, -1))


def _back_to_time(x: Tensor, s: Scan, *, merge: bool = True) -> Tensor:
    """Undo ``_cut``: (b, w, k, g, r) to (b, l, g * r), or (b, l, g, r) without ``merge``."""
    x = x.flatten(1, 2)[:, : s.u.shape[1]]
    x = x.flatten(2) if merge else x
    return x.flip(1) if s.reverse else x.contiguous()


def _state_before(s: Scan, rows: slice, groups: int) -> Tensor:
    """Return the state before the first step of some batch rows, (b, g, r, n)."""
    if s.initial is not None:
        return torch.unflatten(s.initial[rows], 1, (groups, -1))
    num_rows = len(range(*rows.indices(s.u.shape[0])))
    return s.u.new_zeros(num_rows, groups, s.u.shape[2] // groups, s.A.shape[1])
