"""The CUDA norm on the emulated GPU, against autograd of the fp64 formula on the same rounded inputs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD_LIMITS = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 3e-3}
GRADIENT_LIMITS = {"fp32": 5e-5, "bf16": 5e-3, "fp16": 5e-3}
ROWS = (1, 2, 3, 4, 5, 15, 16, 17, 63, 197)
EPS = 1e-5


def formula(stream, weight):
    return stream / torch.sqrt(stream.square().mean(-1, keepdim=True) + EPS) * weight


class Forward(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("x", "residual", "weight", "out", "stream")),
        *((n, ctypes.c_int64) for n in ("rows", "width", "x_row")),
        ("eps", ctypes.c_float),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("stream", "dout", "dstream", "weight", "dx", "dresidual", "sums")),
        *((n, ctypes.c_int64) for n in ("rows", "width", "dout_row", "block_rows")),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Kernel:
    """One compilation."""

    io: str = "fp32"
    pieces: int = 2
    aligned: int = 1


@dataclass(frozen=True)
class Case:
    """One problem."""

    rows: int
    width: int = 192
    block_rows: int = 16
    # which of the optional inputs are given, which of the optional outputs are asked for
    optional: tuple[str, ...] = ("residual", "stream", "dstream", "dx", "dresidual")
    scale: float = 1.0


class Harness:
    """Runs both passes of one kernel."""

    def __init__(self, emulate, root, output, in_wider_rows, kernel, source=None):
        source = source or root / "kernels" / "cuda" / "norm.cu"
        macros = {f"VLM_{key.upper()}": value for key, value in vars(kernel).items()}
        self.kernel, self.output, self.in_wider_rows = kernel, output, in_wider_rows
        self.forward = emulate(source, "vlm_norm_forward", "vlm::NormForward", **macros)
        self.backward = emulate(source, "vlm_norm_backward", "vlm::NormBackward", **macros)
        geometry = (ctypes.c_int64 * 5).in_dll(self.forward.library, "vlm_norm_geometry")
        self.threads, self.shared, self.warps, self.piece, self.most_rows = geometry

    def stored(self, case):
        values = (case.scale * torch.randn(case.rows, case.width)).to(DTYPES[self.kernel.io])
        return self.in_wider_rows(values, 16 if self.kernel.aligned else 3)

    def wide(self, *shape):
        start = 0 if self.kernel.aligned else 1
        return torch.randn(torch.Size(shape).numel() + start)[start:].view(shape)

    def new(self, *shape, dtype=torch.float32):
        return self.output(*shape, dtype=dtype, guard=64 if self.kernel.aligned else 65)

    def run_forward(self, case, seed):
        x, weight = self.stored(case), self.wide(case.width)
        residual = self.wide(*x.shape) if "residual" in case.optional else None
        outputs = {"out": self.new(*x.shape, dtype=x.dtype)}
        problem = Forward(x.data_ptr(), None, weight.data_ptr(), outputs["out"].address())
        problem.rows, problem.width, problem.x_row, problem.eps = *x.shape, x.stride(0), EPS
        if residual is not None:
            problem.residual = residual.data_ptr()
        if "in place" in case.optional:
            problem.stream, before = problem.residual, residual.clone()
        elif "stream" in case.optional:
            outputs["stream"] = self.new(*x.shape)
            problem.stream = outputs["stream"].address()
        grid = -(-case.rows // self.warps)
        self.forward(problem, grid=grid, threads=self.threads, seed=seed)
        actual = {name: value.value() for name, value in outputs.items()}
        if "in place" in case.optional:
            actual["stream"], residual = residual, before
        wide = None if residual is None else residual.double()
        stream = x.double() if wide is None else x.double() + wide
        return {"out": formula(stream, weight.double()), "stream": stream}, actual

    def run_backward(self, case, seed):
        dout, weight, stream = self.stored(case), self.wide(case.width), self.wide(case.rows, case.width)
        dstream = self.wide(*stream.shape) if "dstream" in case.optional else None
        blocks = -(-case.rows // case.block_rows)
        outputs = {"sums": self.new(blocks, case.width)}
        problem = Backward(stream.data_ptr(), dout.data_ptr(), None, weight.data_ptr())
        problem.rows, problem.width, problem.dout_row = *stream.shape, dout.stride(0)
        problem.block_rows, problem.eps, problem.sums = case.block_rows, EPS, outputs["sums"].address()
        if dstream is not None:
            problem.dstream = dstream.data_ptr()
        for name, dtype in (("dx", dout.dtype), ("dresidual", torch.float32)):
            if name in case.optional:
                outputs[name] = self.new(*stream.shape, dtype=dtype)
                setattr(problem, name, outputs[name].address())
        self.backward(problem, grid=blocks, threads=self.threads, shared=self.shared, seed=seed)
        actual = {name: value.value() for name, value in outputs.items()}
        actual["dweight"] = actual.pop("sums").sum(0)
        given = stream.double().requires_grad_(), weight.double().requires_grad_()
        total = (formula(*given) * dout.double()).sum()
        if dstream is not None:
            total = total + (given[0] * dstream.double()).sum()
        gradient, dweight = torch.autograd.grad(total, given)
        return {"dx": gradient, "dresidual": gradient, "dweight": dweight}, actual


@pytest.fixture
def check(emulate, root, output, in_wider_rows):
    """``check(kernel, case, ...)``: both passes are within the contract, to the same bits for all seeds."""

    def run(kernel, *cases, seeds=(0,)):
        harness = Harness(emulate, root, output, in_wider_rows, kernel)
        for call, limits in (
            (harness.run_forward, FORWARD_LIMITS),
            (harness.run_backward, GRADIENT_LIMITS),
        ):
            for case in cases:
                results = []
                for seed in seeds:
                    torch.manual_seed(case.rows)
                    results.append(call(case, seed))
                (truth, actual), *others = results
                for _, other in others:
                    assert all(torch.equal(value, other[name]) for name, value in actual.items())
                for name, value in actual.items():
                    error = (value.double() - truth[name]).norm() / truth[name].norm()
                    # what is stored as fp32 has no rounding of the stored type
                    limit = limits[kernel.io if value.dtype == DTYPES[kernel.io] else "fp32"]
                    assert error <= limit, f"{name} of {case}: {error:.2e}"

    return run


@pytest.mark.parametrize("io", DTYPES)
def test_every_number_of_rows(io, check):
    check(Kernel(io), *(Case(rows) for rows in ROWS))


@pytest.mark.parametrize("kernel", [Kernel("bf16", 2, 0), Kernel("bf16", 0, 0), Kernel("fp32", 0, 1)])
def test_misaligned_rows_and_rows_read_twice(kernel, check):
    widths = (1, 31, 129, 255) if not kernel.aligned else (8, 128, 200, 256)
    check(kernel, *(Case(rows, width) for rows, width in zip((5, 17, 63, 16), widths, strict=True)))


def test_widths(check):
    check(Kernel("fp16", 8), *(Case(6, width) for width in (8, 576, 1000, 1024)))
    check(Kernel("fp32", 0), *(Case(6, width) for width in (1024, 1028, 2048, 4100)))


def test_what_is_optional(check):
    for kernel in (Kernel("bf16"), Kernel("bf16", 0, 0)):
        check(
            kernel,
            Case(9, optional=()),
            Case(9, optional=("residual", "dx")),
            Case(9, optional=("stream", "dresidual")),
            Case(9, optional=("residual", "in place", "dstream")),
        )


def test_rows_of_a_block(check):
    for kernel in (Kernel("fp32"), Kernel("fp32", 0)):
        check(kernel, *(Case(70, 64, block_rows=n) for n in (1, 3, 64)))


def test_large_and_small_values(check):
    """The mean square neither overflows nor drowns in eps where it should not."""
    for scale in (1e-3, 1e4):
        check(Kernel("bf16"), Case(9, optional=("stream", "dx"), scale=scale))


@pytest.mark.parametrize("kernel", [Kernel("bf16"), Kernel("bf16", 0, 0)])
def test_lanes_may_run_in_any_order(kernel, check):
    check(kernel, Case(21, 130 if not kernel.aligned else 136), seeds=range(8))


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_kernel_that_does_not_wait_is_found_out(pieces, emulate, root, output, in_wider_rows, tmp_path):
    whole = (root / "kernels" / "cuda" / "norm.cu").read_text()
    assert whole.count("  __syncthreads();\n") == 2
    broken = tmp_path / "norm.cu"
    broken.write_text(whole.replace("  __syncthreads();\n", ""))
    harness = Harness(emulate, root, output, in_wider_rows, Kernel("bf16", pieces), broken)
    with pytest.raises(AssertionError, match="not finite"):
        harness.run_backward(Case(21), seed=0)
