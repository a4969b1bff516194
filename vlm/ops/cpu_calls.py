"""Calls of the C++ kernels: tensors in, tensors out. Mirrors ``kernels/cpu/problem.h``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vlm.ops import cpu_library
from vlm.ops.selective_scan.reference import Scan, ScanGradients, num_checkpoints

# below so many state updates (or so many elements of a convolution) threads cost more than they save
_SERIAL_UPDATES = 1 << 18
_SERIAL_ELEMENTS = 1 << 15
# independent pieces of the backward pass: enough for the cores of a desk machine, few enough that each reads
# long runs of memory; never depends on the thread count
_BACKWARD_TASKS = 8
_CONV_TILE = 64
_CONV_ROWS = 10

# what sequences may be stored in; parameters and sums are fp32 for bf16
_STORED = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def stored_dtype(*sequences: Tensor | None) -> torch.dtype:
    """Return what the kernels take these sequences in: bf16 if all are, else the dtype of the sums."""
    present = [x for x in sequences if x is not None]
    if all(x.dtype == torch.bfloat16 for x in present):
        return torch.bfloat16
    return torch.promote_types(present[0].dtype, torch.float32)


_POINTERS_IN = ("u", "delta", "A", "B", "C", "D", "bias", "initial")
_POINTERS_OUT = ("last", "kept", "du", "ddelta", "dBC", "dA", "dD", "dbias", "dinitial")


class _Direction(ctypes.Structure):
    """``VlmDirection``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS_IN, *_POINTERS_OUT)),
        *(
            (name, ctypes.c_int64)
            for name in (
                "u_batch",
                "u_row",
                "delta_batch",
                "delta_row",
                "bc_batch",
                "bc_row",
                "bc_group",
                "reverse",
            )
        ),
    ]


class _Problem(ctypes.Structure):
    """``VlmScan``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch",
                "length",
                "channels",
                "states",
                "groups",
                "directions",
                "softplus",
                "threads",
                "parts",
            )
        ),
        ("segments", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("z_batch", ctypes.c_int64),
        ("z_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("dout", "out", "total", "dz")),
        ("direction", _Direction * 2),
        ("turned", ctypes.c_int64),
    ]


class _Convolution(ctypes.Structure):
    """``VlmConv``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "taps", "threads")),
        ("segments", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_batch", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight_f",
                "bias_f",
                "weight_b",
                "bias_b",
                "u_f",
                "u_b",
                "du_f",
                "du_b",
                "dx",
                "dparameters",
            )
        ),
    ]


class _Call:
    """A problem under construction; keeps the tensors alive whose addresses it holds."""

    def __init__(self, problem: _Problem | _Convolution) -> None:
        self.problem = problem
        self._alive: list[Tensor] = []

    def point(self, to: ctypes.Structure, **tensors: Tensor | None) -> None:
        """Store the addresses of tensors under their names."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self._alive.append(tensor)
                setattr(to, name, tensor.data_ptr())

    def run(self, function: str, *, backward: bool, dtype: torch.dtype) -> None:
        """Call the library; ``dtype`` is that of the sequences."""
        call = getattr(cpu_library.library(), function)
        call(ctypes.addressof(self.problem), cpu_library.level(), int(backward), _STORED[dtype])


def _rows(x: Tensor, turned: bool = False) -> Tensor:
    """Return ``x`` (b, l, ...) with contiguous channels, or, turned, with contiguous steps."""
    if turned:
        return x if x.stride(1) == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    """Return ``x`` contiguous."""
    return None if x is None else x.contiguous()


def _scan_call(scans: list[Scan], z: Tensor | None, *, turned: bool = False) -> tuple[_Call, _Problem]:
    """Describe the inputs of one or two directions; ``turned`` if memory holds (b, e, l) and (b, g, n, l)."""
    s = scans[0]
    batch, length, channels = s.u.shape
    groups, states = s.B.shape[2:]
    updates = batch * length * channels * states * len(scans)
    problem = _Problem(
        batch=batch,
        length=length,
        channels=channels,
        states=states,
        groups=groups,
        directions=len(scans),
        softplus=s.softplus,
        threads=1 if updates < _SERIAL_UPDATES else cpu_library.num_threads(),
        parts=1,
        turned=turned,
    )
    row = -1 if turned else 1
    call = _Call(problem)
    call.point(problem, segments=_dense(s.segments))
    if z is not None:
        z = _rows(z, turned)
        call.point(problem, z=z)
        problem.z_batch, problem.z_row = z.stride(0), z.stride(row)
    for q, s in zip(problem.direction, scans, strict=False):
        B, C = _rows(s.B, turned), _rows(s.C, turned)
        if B.stride() != C.stride():
            B, C = (_rows(x.clone(memory_format=torch.contiguous_format), turned) for x in (B, C))
        u, delta = _rows(s.u, turned), _rows(s.delta, turned)
        initial = None if s.initial is None else s.initial.transpose(1, 2).contiguous()
        call.point(
            q, u=u, delta=delta, A=_dense(s.A), B=B, C=C, D=_dense(s.D), bias=_dense(s.bias), initial=initial
        )
        q.u_batch, q.u_row = u.stride(0), u.stride(row)
        q.delta_batch, q.delta_row = delta.stride(0), delta.stride(row)
        q.bc_batch, q.bc_row, q.bc_group = B.stride(0), B.stride(row), B.stride(2)
        q.reverse = s.reverse
    return call, problem


def scan_forward(s: Scan, z: Tensor | None, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one direction on memory with time last and gate it.

    Args:
        s: Its tensors are (b, l, e) and (b, l, g, n) views of (b, e, l) and (b, g, n, l); others are copied.
        z: (b, l, e) as ``s.u``, or None.
        save: Whether a backward pass follows.

    Returns:
        The output (b, e, l); the last state (b, e, n); the output before the gate (b, e, l), empty unless
        saved and gated; the kept states as in ``reference.forward``.
    """
    call, problem = _scan_call([s], z, turned=True)
    batch, length, channels = s.u.shape
    states = s.A.shape[1]
    out = s.u.new_empty(batch, channels, length)
    total = torch.empty_like(out) if save and z is not None else None
    last = s.A.new_empty(batch, states, channels)
    kept = s.A.new_empty(batch, num_checkpoints(length), states, channels) if save else None
    call.point(problem, out=out, total=total)
    call.point(problem.direction[0], last=last, kept=kept)
    call.run("vlm_scan", backward=False, dtype=out.dtype)
    return (
        out,
        last.transpose(1, 2).contiguous(),
        s.u.new_empty(0) if total is None else total,
        s.A.new_empty(0) if kept is None else kept,
    )


def scan_backward(
    dout: Tensor, s: Scan, z: Tensor | None, total: Tensor, kept: Tensor
) -> tuple[ScanGradients, Tensor | None]:
    """Return the gradients of sum(out * dout), as views with time last in memory, and that of the gate.

    Args:
        dout: (b, e, l).
        s: As in ``scan_forward``.
        z: As in ``scan_forward``.
        total: What ``scan_forward`` returned.
        kept: What ``scan_forward`` returned.
    """
    call, problem = _scan_call([s], z, turned=True)
    dz = None if z is None else torch.empty_like(dout, memory_format=torch.contiguous_format)
    call.point(problem, dout=dout.contiguous(), dz=dz)
    if z is not None:
        call.point(problem, total=total.contiguous())
    gradients, _ = _run_backward(call, problem, [s], kept.unsqueeze(0))
    return gradients[0], dz


def bi_scan_forward(scans: list[Scan], z: Tensor, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the directions, add, gate: the gated sum and, if ``save``, the sum and the kept states."""
    call, problem = _scan_call(scans, z)
    u, A = scans[0].u, scans[0].A
    batch, length, channels = u.shape
    out = u.new_empty(batch, length, channels)
    call.point(problem, out=out)
    if not save:
        call.run("vlm_scan", backward=False, dtype=u.dtype)
        return out, u.new_empty(0), A.new_empty(0)
    total = torch.empty_like(out)
    kept = A.new_empty(len(scans), batch, num_checkpoints(length), A.shape[1], channels)
    call.point(problem, total=total)
    for q, states_of in zip(problem.direction, kept, strict=False):
        call.point(q, kept=states_of)
    call.run("vlm_scan", backward=False, dtype=u.dtype)
    return out, total, kept


def bi_scan_backward(
    dout: Tensor, scans: list[Scan], z: Tensor, total: Tensor, kept: Tensor
) -> tuple[list[ScanGradients], list[Tensor], Tensor]:
    """Return each direction's gradients, those of its [B | C] (b, l, 2n), and that of the gate."""
    call, problem = _scan_call(scans, z)
    dz = torch.empty_like(dout, memory_format=torch.contiguous_format)
    call.point(problem, dout=dout.contiguous(), total=total.contiguous(), dz=dz)
    gradients, joined = _run_backward(call, problem, scans, kept)
    return gradients, [x.squeeze(2) for x in joined], dz


def _run_backward(
    call: _Call, problem: _Problem, scans: list[Scan], kept: Tensor
) -> tuple[list[ScanGradients], list[Tensor]]:
    """Run the backward kernel and sum what it leaves for each batch row or part, in a fixed order."""
    u, sums = scans[0].u, scans[0].A
    batch, length, channels = u.shape
    groups, states = scans[0].B.shape[2:]
    tasks = len(scans) * batch * groups
    # 32 channels are the least that one part works on
    problem.parts = max(1, min(channels // groups // 32, -(-_BACKWARD_TASKS // tasks)))
    kept = kept.contiguous()
    sequence = (batch, channels, length) if problem.turned else (batch, length, channels)
    outputs = []
    for q, s, states_of in zip(problem.direction, scans, kept, strict=False):
        out = {
            "du": u.new_empty(sequence),
            "ddelta": u.new_empty(sequence),
            "dBC": sums.new_empty(problem.parts, batch, length, groups, 2 * states),
            "dA": sums.new_empty(batch, states, channels),
            "dD": sums.new_empty(batch, channels),
            "dbias": sums.new_empty(batch, channels),
        }
        if s.initial is not None:
            out["dinitial"] = sums.new_empty(batch, states, channels)
        call.point(q, kept=states_of, **out)
        outputs.append(out)
    call.run("vlm_scan", backward=True, dtype=u.dtype)
    gradients, joined = [], []
    for s, out in zip(scans, outputs, strict=True):
        both = out["dBC"][0] if problem.parts == 1 else out["dBC"].sum(0)
        dB, dC = both.chunk(2, -1)
        joined.append(both)
        gradients.append(
            ScanGradients(
                u=out["du"].transpose(1, 2) if problem.turned else out["du"],
                delta=out["ddelta"].transpose(1, 2) if problem.turned else out["ddelta"],
                A=out["dA"].sum(0).t().contiguous(),
                B=dB,
                C=dC,
                D=None if s.D is None else out["dD"].sum(0),
                bias=None if s.bias is None else out["dbias"].sum(0),
                initial=None if s.initial is None else out["dinitial"].transpose(1, 2).contiguous(),
            )
        )
    return gradients, joined


def _conv_call(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> tuple[_Call, _Convolution]:
    """Describe the inputs of the convolution."""
    x = _rows(x)
    batch, length, channels = x.shape
    problem = _Convolution(
        batch=batch,
        length=length,
        channels=channels,
        taps=weight_f.shape[1],
        threads=1 if x.numel() < _SERIAL_ELEMENTS else cpu_library.num_threads(),
        x_batch=x.stride(0),
        x_row=x.stride(1),
    )
    call = _Call(problem)
    weights = {"weight_f": _dense(weight_f), "weight_b": _dense(weight_b)}
    call.point(
        problem, x=x, bias_f=_dense(bias_f), bias_b=_dense(bias_b), segments=_dense(segments), **weights
    )
    return call, problem


def conv2_forward(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return both directions' outputs; the second is empty without ``weight_b``."""
    call, problem = _conv_call(x, weight_f, bias_f, weight_b, bias_b, segments)
    u_f = x.new_empty(x.shape)
    u_b = x.new_empty(x.shape if weight_b is not None else 0)
    call.point(problem, u_f=u_f, u_b=u_b)
    call.run("vlm_conv2", backward=False, dtype=x.dtype)
    return u_f, u_b


def conv2_backward(
    du_f: Tensor,
    du_b: Tensor | None,
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> list[Tensor | None]:
    """Return dx, dweight_f, dbias_f, dweight_b, dbias_b."""
    call, problem = _conv_call(x, weight_f, bias_f, weight_b, bias_b, segments)
    batch, length, channels = x.shape
    dx = x.new_empty(x.shape)
    sums = weight_f.new_empty(batch * -(-length // _CONV_TILE), _CONV_ROWS, channels)
    call.point(problem, du_f=du_f.contiguous(), du_b=_dense(du_b), dx=dx, dparameters=sums)
    call.run("vlm_conv2", backward=True, dtype=x.dtype)
    taps = weight_f.shape[1]
    rows = sums.sum(0)
    gradients: list[Tensor | None] = [dx]
    for first, weight, bias in ((0, weight_f, bias_f), (5, weight_b, bias_b)):
        gradients.append(None if weight is None else rows[first + 4 - taps : first + 4].t().contiguous())
        gradients.append(None if bias is None else rows[first + 4])
    return gradients
