"""Who is timed: our operators on each backend, and what else computes the same scan.

The rivals are written plainly, as their authors would; none is tuned down. Letters as in ``cases``.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Case, draw, forced, job, weights
from torch import Tensor
from torch.nn.functional import silu, softplus

from vlm.ops import selective_scan

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Task:
    """One computation, ready to be repeated.

    Attributes:
        forward: Returns the output, (b, l, e) or, if ``turned``, (b, e, l).
        leaves: What gradients belong to; as ``draw`` returns them, or, if ``turned``, with time last and B
            and C apart.
        weight: What flows into the output on the way back.
        backend: Forced while it runs, if it goes through our operators.
        turned: Whether sequences have time last.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    weight: Tensor
    backend: str | None = None
    turned: bool = False

    def once(self, *, gradient: bool) -> list[Tensor]:
        """Compute the output and, if asked, the gradients of the leaves."""
        if self.backend is not None:
            with forced(self.backend):
                return self._once(gradient)
        return self._once(gradient)

    def _once(self, gradient: bool) -> list[Tensor]:
        out = self.forward()
        if not gradient:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.weight)]

    def in_order(self, results: list[Tensor]) -> list[Tensor]:
        """Return what ``once`` gave as ``cases.truth`` has it."""
        if not self.turned:
            return results
        out, *rest = results
        if not rest:
            return [out.transpose(1, 2)]
        u, z, delta, B, C, *parameters = rest
        sequences = [x.transpose(1, 2) for x in (out, u, z, delta)]
        return [*sequences, torch.cat([B, C], 1).transpose(1, 2), *parameters]


@dataclass(frozen=True, slots=True)
class Rival:
    """How one implementation is set up.

    Attributes:
        prepare: Returns the task of a case; raises if it cannot run here.
        what: One line for the results.
        kinds: Cases that it can do.
        has_gradient: Whether it has a gradient that can be waited for.
    """

    prepare: Callable[[Case, bool], Task]
    what: str
    kinds: tuple[str, ...] = ("scan",)
    has_gradient: bool = False


def _operator(backend: str) -> Callable[[Case, bool], Task]:
    """Our channels-last operator on a backend."""

    def prepare(case: Case, gradient: bool) -> Task:
        leaves = [x.requires_grad_(gradient) for x in draw(case)]
        return Task(job(case, leaves, gradient=gradient), leaves, weights(case), backend)

    return prepare


def _turned(case: Case) -> list[Tensor]:
    """Return u, z, delta (b, e, l), B, C (b, n, l), A, D, bias."""
    u, z, delta, rows, A, D, bias = draw(case)
    sequences = [x.transpose(1, 2).contiguous() for x in (u, z, delta, *rows.chunk(2, -1))]
    return [*sequences, A, D, bias]


def _time_last(case: Case, gradient: bool) -> Task:
    """Our operator with mamba-ssm's signature and layout, on the C++ kernels."""
    leaves = [x.requires_grad_(gradient) for x in _turned(case)]
    u, z, delta, B, C, A, D, bias = leaves

    def run() -> Tensor:
        out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)
        assert isinstance(out, Tensor)
        return out

    return Task(run, leaves, weights(case).transpose(1, 2).contiguous(), "cpu", turned=True)


def _sequential(case: Case, gradient: bool) -> Task:
    """One step of all channels at a time, differentiated by autograd."""
    leaves = [x.requires_grad_(gradient) for x in draw(case)]
    u, z, delta, rows, A, D, bias = leaves

    def run() -> Tensor:
        dt = softplus(delta + bias)
        B, C = rows.chunk(2, -1)
        driven = dt * u
        h = u.new_zeros(case.batch, case.channels, case.states)
        y = []
        steps = (x.unbind(1) for x in (dt, driven, B, C))
        for dt_t, driven_t, B_t, C_t in zip(*steps, strict=True):
            h = torch.exp(dt_t.unsqueeze(-1) * A) * h + driven_t.unsqueeze(-1) * B_t.unsqueeze(1)
            y.append((h * C_t.unsqueeze(1)).sum(-1))
        out: Tensor = (torch.stack(y, 1) + u * D) * silu(z)
        return out

    return Task(run, leaves, weights(case))


def _materialised(case: Case, gradient: bool) -> Task:
    """All decays and inputs (b, e, l, n) at once, then a loop over l: the plan of ``selective_scan_ref``."""
    leaves = _turned(case)
    u, z, delta, B, C, A, D, bias = leaves

    def run() -> Tensor:
        dt = softplus(delta + bias.unsqueeze(-1))
        decay = torch.exp(torch.einsum("bel,en->beln", dt, A))
        driven = torch.einsum("bel,bnl,bel->beln", dt, B, u)
        h = u.new_zeros(case.batch, case.channels, case.states)
        y = []
        for t in range(case.length):
            h = decay[:, :, t] * h + driven[:, :, t]
            y.append(torch.einsum("ben,bn->be", h, C[:, :, t]))
        return (torch.stack(y, 2) + u * D.unsqueeze(-1)) * silu(z)

    return Task(run, leaves, weights(case), turned=True)


def _step(h: Tensor, dt: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state after one step and its output."""
    h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    return h, (h * C.unsqueeze(1)).sum(-1)


def _compiled(case: Case, gradient: bool) -> Task:
    """The loop with its body through torch.compile: one fused kernel a step."""
    leaves = draw(case)
    u, z, delta, rows, A, D, bias = leaves
    step = torch.compile(_step, fullgraph=True, dynamic=False)
    before = torch.compile(lambda delta, bias: softplus(delta + bias), dynamic=False)
    after = torch.compile(lambda y, u, D, z: (y + u * D) * silu(z), dynamic=False)

    def run() -> Tensor:
        dt = before(delta, bias)
        h = u.new_zeros(case.batch, case.channels, case.states)
        y = []
        for t in range(case.length):
            B_t, C_t = rows[:, t, : case.states], rows[:, t, case.states :]
            h, y_t = step(h, dt[:, t], u[:, t], B_t, C_t, A)
            y.append(y_t)
        out: Tensor = after(torch.stack(y, 1), u, D, z)
        return out

    return Task(run, leaves, weights(case))


def _associative(case: Case, gradient: bool) -> Task:
    """PyTorch's own associative scan over time; its generic mode, as the other one wants a GPU."""
    from torch._higher_order_ops.associative_scan import associative_scan

    leaves = draw(case)
    u, z, delta, rows, A, D, bias = leaves

    def combine(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x[0] * y[0], x[1] * y[0] + y[1]

    def run() -> Tensor:
        dt = softplus(delta + bias)
        B, C = rows.chunk(2, -1)
        pairs = (torch.exp(dt.unsqueeze(-1) * A), (dt * u).unsqueeze(-1) * B.unsqueeze(2))
        h = associative_scan(combine, pairs, dim=1, combine_mode="generic")[1]
        out: Tensor = (torch.einsum("blen,bln->ble", h, C) + u * D) * silu(z)
        return out

    return Task(run, leaves, weights(case))


@functools.cache
def compiled_library(source: str, *flags: str) -> ctypes.CDLL:
    """Compile one C++ file of this folder with the system's compiler and load it.

    Raises:
        subprocess.CalledProcessError: It does not compile with these flags.
    """
    folder = Path(tempfile.mkdtemp())
    target = folder / "library.so"
    command = [
        "g++",
        "-std=c++17",
        "-O3",
        "-shared",
        "-fPIC",
        *flags,
        str(FOLDER / source),
        "-o",
        str(target),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(target))
    finally:
        target.unlink(missing_ok=True)  # a loaded library needs no name
        folder.rmdir()


def _scalar(*flags: str) -> Callable[[Case, bool], Task]:
    """The C++ loop, compiled with ``flags``."""

    def prepare(case: Case, gradient: bool) -> Task:
        leaves = draw(case)
        scan = compiled_library("scalar_scan.cpp", *flags).scan
        scan.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 8
        sizes = (case.batch, case.length, case.channels, case.states)

        def run() -> Tensor:
            out = torch.empty(case.batch, case.length, case.channels)
            u, z, delta, *rest = leaves
            scan(*sizes, *(x.data_ptr() for x in (u, delta, z, *rest, out)))
            return out

        return Task(run, leaves, weights(case))

    return prepare


BOTH = ("scan", "block")
RIVALS = {
    "cpu": Rival(_operator("cpu"), "our operator, C++ kernels", BOTH, has_gradient=True),
    "cpu-bdl": Rival(_time_last, "our operator with mamba-ssm's layout, C++ kernels", has_gradient=True),
    "chunked": Rival(_operator("chunked"), "our operator, chunks in PyTorch", BOTH, has_gradient=True),
    "reference": Rival(
        _operator("reference"), "our operator, PyTorch loop with a gradient by hand", BOTH, has_gradient=True
    ),
    "sequential": Rival(_sequential, "PyTorch loop over time, autograd", has_gradient=True),
    "materialised": Rival(_materialised, "plan of mamba-ssm's selective_scan_ref: (b, e, l, n), then a loop"),
    "compiled": Rival(_compiled, "PyTorch loop, its body through torch.compile"),
    "associative": Rival(_associative, "torch associative_scan, generic mode"),
    "scalar": Rival(_scalar(), "C++ loop, g++ -O3"),
    "scalar-native": Rival(_scalar("-march=native"), "C++ loop, g++ -O3 -march=native"),
}
# those whose outputs and gradients are proven on a small case before anything is timed
BACKENDS = ("cpu", "cpu-bdl", "chunked", "reference")
