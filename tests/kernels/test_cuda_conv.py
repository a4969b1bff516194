"""The CUDA convolution on the emulated GPU, against autograd of the fp64 formula on the same inputs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch

from vlm.ops.causal_conv import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD_LIMITS = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 3e-3}
GRADIENT_LIMITS = {"fp32": 5e-5, "bf16": 5e-3, "fp16": 5e-3}
LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 63, 197)


class Sequence(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("batch", "length", "channels", "stretch", "x_batch", "x_row")),
    ]


class Filter(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Forward(ctypes.Structure):
    _fields_ = [("sequence", Sequence), ("filter", Filter * 2), ("out", ctypes.c_void_p * 2)]


class Backward(ctypes.Structure):
    _fields_ = [
        ("sequence", Sequence),
        ("filter", Filter * 2),
        ("du", ctypes.c_void_p * 2),
        ("du_batch", ctypes.c_int64 * 2),
        ("du_row", ctypes.c_int64 * 2),
        ("dx", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Kernel:
    """One compilation."""

    io: str = "fp32"
    taps: int = 4
    directions: int = 2
    aligned: int = 1
    segments: int = 0


@dataclass(frozen=True)
class Case:
    """One problem."""

    length: int
    channels: int = 40
    batch: int = 2
    stretch: int = 26
    bias: bool = True
    scale: float = 1.0


class Inputs:
    """What one case computes with, in the types and at the addresses that the kernel takes."""

    def __init__(self, kernel, case, in_wider_rows):
        torch.manual_seed(case.length)
        shape = (case.batch, case.length, case.channels)
        pad = 16 if kernel.aligned else 3

        def rows():
            return in_wider_rows((case.scale * torch.randn(shape)).to(DTYPES[kernel.io]), pad)

        def parameter(*shape):
            start = 0 if kernel.aligned else 1
            return torch.randn(torch.Size(shape).numel() + start)[start:].view(shape)

        directions = range(kernel.directions)
        self.x, self.du = rows(), [rows() for _ in directions]
        self.weight = [parameter(case.channels, kernel.taps) for _ in directions]
        self.bias = [parameter(case.channels) if case.bias else None for _ in directions]
        self.segments = None
        if kernel.segments:
            self.segments = (torch.rand(shape[:2]) < 0.3).cumsum(1).to(torch.int32)

    def truth(self):
        """Outputs and gradients in fp64."""

        def wide(x):
            return None if x is None else x.double().detach().requires_grad_()

        x, weight, bias = wide(self.x), list(map(wide, self.weight)), list(map(wide, self.bias))
        out = [
            reference.forward(x, w, b, self.segments, anticausal=d == 1)
            for d, (w, b) in enumerate(zip(weight, bias, strict=True))
        ]
        total = sum((u * du.double()).sum() for u, du in zip(out, self.du, strict=True))
        given = [x, *weight, *(b for b in bias if b is not None)]
        dx, *parameters = torch.autograd.grad(total, given)
        results = {f"out{d}": u.detach() for d, u in enumerate(out)}
        results |= {f"dweight{d}": parameters[d] for d in range(len(out))}
        results |= {f"dbias{d}": g for d, g in enumerate(parameters[len(out) :])}
        return {"dx": dx, **results}

    def sequence(self, case):
        segments = None if self.segments is None else self.segments.data_ptr()
        sizes = (*self.x.shape, case.stretch, *self.x.stride()[:2])
        return Sequence(self.x.data_ptr(), segments, *sizes)

    def filters(self):
        pairs = zip(self.weight, self.bias, strict=True)
        return (Filter * 2)(*(Filter(w.data_ptr(), None if b is None else b.data_ptr()) for w, b in pairs))


class Harness:
    """Runs the cases of one kernel."""

    def __init__(self, emulate, root, output, kernel, backward, source=None):
        name = "conv_backward" if backward else "conv_forward"
        problem = "vlm::ConvBackward" if backward else "vlm::ConvForward"
        source = source or root / "kernels" / "cuda" / f"{name}.cu"
        macros = {f"VLM_{key.upper()}": value for key, value in vars(kernel).items()}
        self.kernel, self.output, self.backward = kernel, output, backward
        self.emulated = emulate(source, f"vlm_{name}", problem, **macros)
        geometry = (ctypes.c_int64 * 4).in_dll(self.emulated.library, f"vlm_{name}_geometry")
        self.threads, self.shared, self.tile_channels, self.slots = geometry

    def new(self, *shape, dtype=torch.float32):
        return self.output(*shape, dtype=dtype, guard=64 if self.kernel.aligned else 65)

    def launch(self, case, inputs, seed=0):
        stretches = -(-case.length // case.stretch)
        walkers = case.batch * stretches * -(-case.channels // self.tile_channels)
        shape, dtype = tuple(inputs.x.shape), DTYPES[self.kernel.io]
        directions, taps = self.kernel.directions, self.kernel.taps
        if self.backward:
            outputs = {
                "dx": self.new(*shape, dtype=dtype),
                "sums": self.new(case.batch, stretches, directions, taps + 1, case.channels),
            }
            problem = Backward(inputs.sequence(case), inputs.filters())
            problem.dx, problem.sums = outputs["dx"].address(), outputs["sums"].address()
            for d, du in enumerate(inputs.du):
                problem.du[d], problem.du_batch[d], problem.du_row[d] = du.data_ptr(), *du.stride()[:2]
        else:
            outputs = {f"out{d}": self.new(*shape, dtype=dtype) for d in range(directions)}
            problem = Forward(inputs.sequence(case), inputs.filters())
            for d in range(directions):
                problem.out[d] = outputs[f"out{d}"].address()
        grid = -(-walkers // self.slots)
        self.emulated(problem, grid=grid, threads=self.threads, shared=self.shared, seed=seed)
        return {name: output.value() for name, output in outputs.items()}


@pytest.fixture
def check(emulate, root, output, in_wider_rows):
    """``check(kernel, case, ...)``: both passes are within the contract, to the same bits for all seeds."""

    def run(kernel, *cases, seeds=(0,)):
        for backward in (False, True):
            harness = Harness(emulate, root, output, kernel, backward)
            limits = GRADIENT_LIMITS if backward else FORWARD_LIMITS
            for case in cases:
                inputs = Inputs(kernel, case, in_wider_rows)
                actual, *others = (harness.launch(case, inputs, seed) for seed in seeds)
                for other in others:
                    assert all(torch.equal(value, other[name]) for name, value in actual.items())
                truth = inputs.truth()
                if backward:
                    for d, sums in enumerate(actual.pop("sums").sum((0, 1))):
                        actual[f"dweight{d}"] = sums[:-1].T
                        if case.bias:
                            actual[f"dbias{d}"] = sums[-1]
                for name, value in actual.items():
                    error = (value.double() - truth[name]).norm() / truth[name].norm()
                    # what is stored as fp32 has no rounding of the stored type
                    limit = limits[kernel.io if value.dtype == DTYPES[kernel.io] else "fp32"]
                    assert error <= limit, f"{name} of {case}: {error:.2e}"

    return run


@pytest.mark.parametrize("io", DTYPES)
def test_every_length(io, check):
    check(Kernel(io), *(Case(length) for length in LENGTHS))


@pytest.mark.parametrize("kernel", [Kernel("fp32", segments=1), Kernel("bf16", aligned=0, segments=1)])
def test_segments(kernel, check):
    check(kernel, *(Case(length, channels=24) for length in LENGTHS))


@pytest.mark.parametrize(
    "kernel", [Kernel("fp32", 3, 2, segments=1), Kernel("bf16", 2, 1), Kernel("fp16", 3, 1, 0)]
)
def test_taps_and_directions(kernel, check):
    check(kernel, *(Case(length, channels=16) for length in LENGTHS[:-1]))


@pytest.mark.parametrize("io", ["fp32", "bf16"])
def test_any_number_of_channels(io, check):
    sizes = (8, 120, 136, 264)
    check(Kernel(io), *(Case(19, channels, stretch=10) for channels in sizes), seeds=(0, 1))
    check(Kernel("bf16", aligned=0, segments=1), *(Case(19, n, stretch=10) for n in (1, 31, 65, 130)))


def test_stretches_do_not_show(check):
    """Shorter than the filter's reach, not whole tiles, longer than the sequence; without bias."""
    check(Kernel(), *(Case(50, 16, stretch=n, bias=False) for n in (1, 2, 3, 13, 49, 50, 51, 1000)))


def test_saturated_gates(check):
    """Far on both sides of SiLU nothing overflows."""
    for io in ("fp32", "bf16"):
        check(Kernel(io), Case(33, 16, scale=1000.0))


@pytest.mark.parametrize("kernel", [Kernel("bf16"), Kernel("bf16", aligned=0, segments=1)])
def test_lanes_may_run_in_any_order(kernel, check):
    check(kernel, Case(70, 80, batch=1, stretch=33), seeds=range(8))


# what each synchronisation is there for shows when it is taken out
OMISSIONS = [
    ("    wait_copies<1>();\n    sync_warp();", "    wait_copies<1>();"),
    ("    }\n    sync_warp();\n  }", "    }\n  }"),
    ("wait_copies<1>();", "wait_copies<2>();"),
]


@pytest.mark.parametrize(("text", "without"), OMISSIONS)
def test_a_kernel_that_does_not_wait_is_found_out(
    text, without, emulate, root, output, in_wider_rows, tmp_path
):
    whole = (root / "kernels" / "cuda" / "conv_backward.cu").read_text()
    assert whole.count(text) == 1
    broken = tmp_path / "conv_backward.cu"
    broken.write_text(whole.replace(text, without))
    kernel, case = Kernel("bf16"), Case(90, 64, batch=1, stretch=90)
    inputs = Inputs(kernel, case, in_wider_rows)
    harness = Harness(emulate, root, output, kernel, backward=True, source=broken)
    with pytest.raises(AssertionError, match="not finite"):
        for seed in range(16):
            harness.launch(case, inputs, seed)


def test_nan_reaches_only_what_depends_on_it(emulate, root, output, in_wider_rows):
    kernel, case = Kernel("bf16"), Case(40, 24)
    inputs = Inputs(kernel, case, in_wider_rows)
    clean = Harness(emulate, root, output, kernel, backward=False).launch(case, inputs)
    inputs.x[0, 20, 5] = float("nan")
    expected = inputs.truth()
    harness = Harness(emulate, root, output, kernel, backward=False)
    harness.output = type("Any", (output,), {"value": lambda self: self.room[64:-64].view(self.shape)})
    for name, value in harness.launch(case, inputs).items():
        bad = expected[name].isnan()
        assert bad.sum() == kernel.taps and torch.equal(value.isnan(), bad)
        assert torch.equal(value[~bad], clean[name][~bad])


def test_stretch_is_only_a_matter_of_speed_forward(emulate, root, output, in_wider_rows):
    kernel, case = Kernel("bf16"), Case(63, 40)
    inputs = Inputs(kernel, case, in_wider_rows)
    harness = Harness(emulate, root, output, kernel, backward=False)
    whole, short = (harness.launch(replace(case, stretch=n), inputs) for n in (63, 10))
    assert all(torch.equal(value, short[name]) for name, value in whole.items())
