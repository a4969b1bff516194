"""The CUDA scan's backward pass on the emulated GPU, against the fp64 reference on the same inputs."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from tests.kernels.test_cuda_scan import DTYPES, Case, Direction, Kernel, Output, draw_direction, strided
from vlm.ops.selective_scan import reference
from vlm.ops.selective_scan.reference import Scan

LIMITS = {"fp32": 5e-5, "bf16": 5e-3, "fp16": 5e-3}
SUM_THREADS = 256
PARTIAL = ("dA", "dD", "dbias", "dBC")


class BackwardDirection(ctypes.Structure):
    _fields_ = [
        ("given", Direction),
        *((n, ctypes.c_void_p) for n in ("du", "ddelta", "dA", "dD", "dbias", "dinitial", "dBC", "carry")),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_int64)
            for n in ("batch", "length", "channels", "groups", "softplus", "reverse", "spans")
        ),
        *((n, ctypes.c_void_p) for n in ("segments", "z")),
        *((n, ctypes.c_int64) for n in ("z_batch", "z_row")),
        *((n, ctypes.c_void_p) for n in ("dout", "total", "dz")),
        ("direction", BackwardDirection * 2),
    ]


class PartialSum(ctypes.Structure):
    _fields_ = [
        ("parts", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("count", "size", "columns", "row", "stored")),
    ]


class PartialSums(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("of", PartialSum * 8)]


def aligned(values):
    """The values at an address that is a multiple of 64."""
    room = torch.empty(values.numel() + 64, dtype=values.dtype)
    start = -room.data_ptr() // values.element_size() % 32
    return room[start : start + values.numel()].view(values.shape).copy_(values)


def scans(case, directions, segments):
    """The problem in fp64, one scan for each direction; delta as the kernel may get it from rank rows."""
    for number, inputs in enumerate(directions):
        wide = {name: value.double() for name, value in inputs.items()}
        delta = wide["delta"] if "weight" not in wide else wide["delta"] @ wide["weight"].T
        parameters = (wide.get(name) for name in ("D", "bias", "initial"))
        reverse = number == 1 or case.reverse
        yield Scan(
            wide["u"], delta, wide["A"], wide["B"], wide["C"], *parameters, segments, case.softplus, reverse
        )


class Harness:
    """Runs one case of one kernel and of the sum that follows it."""

    def __init__(self, emulate, root, kernel, source=None):
        macros = {f"VLM_{name.upper()}": value for name, value in vars(kernel).items()}
        folder = root / "kernels" / "cuda"
        self.kernel = kernel
        self.finite = True
        self.scales: dict[str, float] = {}
        self.shift = 0.0
        self.spans = 1
        source = source or folder / "scan_backward.cu"
        self.emulated = emulate(source, "vlm_scan_backward", "vlm::ScanBackward", **macros)
        self.carry = lambda: emulate(source, "vlm_scan_backward_carry", "vlm::ScanBackward", **macros)
        # of the macros, only the stored type matters to it
        plain = {f"VLM_{name.upper()}": value for name, value in vars(Kernel(kernel.io)).items()}
        self.sum = emulate(folder / "sum.cu", "vlm_sum", "vlm::PartialSums", **plain)
        geometry = (ctypes.c_int64 * 4).in_dll(self.emulated.library, "vlm_scan_backward_geometry")
        self.threads, self.shared, self.tile_channels, self.warps = geometry

    def run(self, case, seeds=(0,)):
        """Return expected and actual gradients; every seed must give the same bits."""
        torch.manual_seed(case.seed)
        dtype = DTYPES[self.kernel.io]
        directions = [draw_direction(self.kernel, case) for _ in range(self.kernel.directions)]
        rows = (case.batch, case.length, case.channels)
        pad = 16 if self.kernel.aligned else 3
        z = strided(torch.randn(rows).to(dtype), pad) if "z" in case.optional else None
        for inputs in (*directions, {} if z is None else {"z": z}):
            for name in inputs.keys() & self.scales.keys():
                inputs[name].mul_(self.scales[name])
        for inputs in directions:
            inputs["delta"].add_(self.shift)
        segments = None
        if "segments" in case.optional:
            segments = (torch.rand(rows[:2]) < 0.1).cumsum(1).to(torch.int32)
        dout = aligned(torch.randn(rows).to(dtype))
        problem = list(scans(case, directions, segments))
        runs = [reference.forward(scan, save=True) for scan in problem]
        total = torch.stack([y for y, _, _ in runs]).sum(0)
        kept = [aligned(states.float()) for _, _, states in runs]
        results = [
            self._launch(case, directions, z, segments, dout, aligned(total.to(dtype)), kept, seed)
            for seed in seeds
        ]
        for other in results[1:]:
            assert all(torch.equal(value, other[name]) for name, value in results[0].items())
        return self._truth(problem, z, dout, total), results[0]

    @staticmethod
    def _truth(problem, z, dout, total):
        dy, expected = dout.double(), {}
        if z is not None:
            wide = z.double().requires_grad_()
            gate = torch.nn.functional.silu(wide)
            (expected["dz"],) = torch.autograd.grad(gate, wide, dy * total)
            dy = dy * gate.detach()
        for number, scan in enumerate(problem):
            gradients = reference.backward(dy, scan)
            for name in ("u", "delta", "A", "D", "bias", "initial"):
                value = getattr(gradients, name)
                if value is not None:
                    expected[f"d{name}{number}"] = value
            expected[f"dBC{number}"] = torch.stack([gradients.B, gradients.C], 3)
        return expected

    def _launch(self, case, directions, z, segments, dout, total, kept, seed):
        dtype = DTYPES[self.kernel.io]
        rows = (case.batch, case.length, case.channels)
        states = self.kernel.states
        tiles = -(-case.channels // case.groups // self.tile_channels)
        problem = Problem(*rows, case.groups, case.softplus, case.reverse, self.spans)
        problem.dout, outputs = dout.data_ptr(), {}
        if segments is not None:
            problem.segments = segments.data_ptr()
        if z is not None:
            problem.z, problem.z_batch, problem.z_row = z.data_ptr(), *z.stride()[:2]
            problem.total = total.data_ptr()
            outputs["dz"] = Output(*rows, dtype=dtype)
            problem.dz = outputs["dz"].address()
        for number, inputs in enumerate(directions):
            direction = problem.direction[number]
            given = direction.given
            for name, value in inputs.items():
                setattr(given, name, value.data_ptr())
            for name in ("u", "delta"):
                setattr(given, f"{name}_batch", inputs[name].stride(0))
                setattr(given, f"{name}_row", inputs[name].stride(1))
            given.bc_batch, given.bc_row, given.bc_group = inputs["B"].stride()[:3]
            # it is in `kept`
            given.initial, given.kept = None, kept[number].data_ptr()
            shapes = {
                "du": rows,
                "ddelta": rows,
                "dA": (case.batch, self.spans, case.channels, states),
                "dBC": (tiles, *rows[:2], case.groups, 2, states),
            }
            sums = (case.batch, self.spans, case.channels)
            shapes |= {f"d{name}": sums for name in ("D", "bias") if name in inputs}
            if "initial" in inputs:
                shapes["dinitial"] = (case.batch, case.channels, states)
            if self.spans > 1:
                shapes["carry"] = (case.batch, self.spans - 1, 2, states, case.channels)
            for name, shape in shapes.items():
                output = Output(*shape, dtype=dtype if name in ("du", "ddelta") else torch.float32)
                outputs[f"{name}{number}"] = output
                setattr(direction, name, output.address())
        warps = case.batch * self.kernel.directions * case.groups * tiles
        size = {"threads": self.threads, "shared": self.shared, "seed": seed}
        if self.spans > 1:
            self.carry()(problem, grid=-(-warps * (self.spans - 1) // self.warps), **size)
        self.emulated(problem, grid=-(-warps * self.spans // self.warps), **size)
        results = {name: output.value(self.finite) for name, output in outputs.items()}
        return self._add_up({name: r for name, r in results.items() if name[:-1] != "carry"}, seed)

    def _add_up(self, results, seed):
        """Let the second kernel sum what is in parts; its rows lie in wider ones."""
        sums, keep, pad = PartialSums(0), [], 5
        for name in [name for name in results if name.rstrip("01") in PARTIAL]:
            stored = name.startswith("dBC")
            parts = results[name].float()
            parts = parts if stored else parts.flatten(0, 1)
            shape = parts.shape[1:]
            columns = shape[-1] if not stored else shape[-1] * shape[-2] * shape[-3]
            dtype = DTYPES[self.kernel.io] if stored else torch.float32
            out = Output(shape.numel() // columns, columns + pad, dtype=dtype)
            sums.of[sums.count] = PartialSum(
                parts.data_ptr(), out.address(), len(parts), shape.numel(), columns, columns + pad, stored
            )
            sums.count += 1
            keep.append((name, out, columns, shape, parts))
        grid = sum(-(-s.size // SUM_THREADS) for s in sums.of[: sums.count])
        self.sum(sums, grid=grid, threads=SUM_THREADS, seed=seed)
        for name, out, columns, shape, _ in keep:
            inside = out.room[64:-64].view(out.shape)
            assert inside[:, columns:].isnan().all()
            assert not self.finite or inside[:, :columns].isfinite().all()
            results[name] = inside[:, :columns].reshape(shape).double()
        return results


@pytest.fixture
def check(emulate, root):
    """``check(kernel, case, ...)``: every gradient is within the contract."""

    def run(kernel, *cases, seeds=(0,), spans=1):
        harness = Harness(emulate, root, kernel)
        harness.spans = spans
        for case in cases:
            expected, actual = harness.run(case, seeds)
            assert expected.keys() == actual.keys()
            for name, value in actual.items():
                error, size = (value - expected[name]).norm(), expected[name].norm()
                assert error <= LIMITS[kernel.io] * size, f"{name} of {case}: {error:.2e} of {size:.2e}"

    return run


LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 75, 197)
EVERYTHING = ("segments", "initial", "D", "bias", "z")


@pytest.mark.parametrize("io", DTYPES)
def test_two_directions(io, check):
    check(Kernel(io, directions=2), *(Case(length, optional=("D", "bias", "z")) for length in LENGTHS))


@pytest.mark.parametrize("io", DTYPES)
def test_one_direction_with_everything_optional(io, check):
    kernel = Kernel(io, events=1)
    for reverse in (False, True):
        check(kernel, *(Case(n, reverse=reverse, optional=EVERYTHING) for n in LENGTHS))
    # nothing given, nothing asked for
    check(kernel, Case(40, optional=()), Case(40, optional=(), softplus=False, reverse=True))
    check(kernel, Case(75, optional=("segments", "initial", "D", "z"), softplus=False))


@pytest.mark.parametrize("io", ["fp32", "bf16"])
def test_any_number_of_channels(io, check):
    kernel = Kernel(io, directions=2, aligned=0, events=1)
    check(kernel, *(Case(33, channels, optional=EVERYTHING) for channels in (1, 31, 32, 65)))
    check(kernel, Case(50, 70, groups=2, optional=EVERYTHING), Case(197, 3, optional=EVERYTHING))


@pytest.mark.parametrize("states", [8, 16, 32, 64])
def test_states_groups_and_aligned_tails(states, check):
    kernel = Kernel("bf16" if states < 32 else "fp32", states, directions=2, events=1)
    check(kernel, Case(70, 72, optional=EVERYTHING), Case(20, 96, groups=3, optional=EVERYTHING))
    check(kernel, Case(33, 272, batch=1, groups=2))


@pytest.mark.parametrize(
    ("rank", "io", "directions"),
    [(16, "fp16", 2), (32, "bf16", 1), (48, "bf16", 2), (16, "fp32", 2), (48, "fp32", 1)],
)
def test_delta_from_rank_rows(rank, io, directions, check):
    kernel = Kernel(io, directions=directions, rank=rank, events=1)
    check(kernel, *(Case(length, 72, optional=EVERYTHING) for length in (1, 17, 75)))


@pytest.mark.parametrize("io", ["fp32", "bf16"])
def test_lanes_may_run_in_any_order(io, check):
    """Also says that results repeat to the bit."""
    kernel = Kernel(io, directions=2, events=1)
    check(kernel, Case(70, 72, optional=EVERYTHING, seed=1), seeds=range(8))


@pytest.mark.parametrize(("spans", "io"), [(2, "fp32"), (3, "bf16"), (8, "fp32")])
def test_spans_of_time(spans, io, check):
    kernel = Kernel(io, directions=2, events=1)
    check(kernel, *(Case(n, optional=EVERYTHING) for n in (5, 64, 75, 197)), seeds=(0, 1), spans=spans)
    # one that no border of a segment helps
    check(kernel, Case(197, optional=("initial", "D", "z")), spans=spans)


def test_extreme_inputs_stay_finite(emulate, root):
    """Softplus far on both sides, gates that vanish, decays that do and that never do."""
    for io in ("fp32", "bf16"):
        harness = Harness(emulate, root, Kernel(io, directions=2, events=1))
        for scale in (1e-6, 1e3):
            harness.scales = {"A": scale, "delta": 30.0, "z": 40.0}
            expected, actual = harness.run(Case(50, 32, optional=EVERYTHING))
            for name, value in actual.items():
                error = (value - expected[name]).norm() / expected[name].norm()
                assert error <= LIMITS[io], f"{name}: {error:.2e}"


def test_small_steps_keep_their_relative_accuracy(emulate, root):
    """Where softplus is tiny, so is its slope: the gradient of delta is compared with values as small."""
    harness = Harness(emulate, root, Kernel("fp32"))
    for shift in (-3.0, -12.0, -40.0):
        harness.shift = shift
        expected, actual = harness.run(Case(40, optional=("D", "bias", "z")))
        error = (actual["ddelta0"] - expected["ddelta0"]).norm() / expected["ddelta0"].norm()
        # an exponential's argument of 40 is itself only known to 2e-6
        assert error <= 4e-6, f"{shift}: {error:.2e}"


# What each wait and each hand-over in time is there for shows when it is taken out: with a number of states
# that needs no shuffles just there, for in the emulation they wait, too; or with lanes that do not read what
# they overwrite themselves.
TWO = Kernel("bf16", directions=2, events=1)
FAULTS = [
    (TWO, "  wait_copies<0>();\n  sync_warp();", "  wait_copies<0>();"),
    (TWO, "  wait_copies<0>();", ""),
    (TWO, "  widen<Io>(w);\n  sync_warp();", "  widen<Io>(w);"),
    (replace(TWO, aligned=0), "    store_dz(w, times);\n    sync_warp();\n", "    store_dz(w, times);\n"),
    (TWO, "passage);\n      sync_warp();\n", "passage);\n"),
    (
        replace(TWO, states=32),
        "      store_rows(w, chunk, first, 1);\n      sync_warp();\n",
        "      store_rows(w, chunk, first, 1);\n",
    ),
    (TWO, "carry, dA);\n      sync_warp();\n", "carry, dA);\n"),
    (
        TWO,
        "      finish(w, chunk, first, sums);\n      sync_warp();\n",
        "      finish(w, chunk, first, sums);\n",
    ),
    (TWO, "carry.of[c][n] = g[c] * passage.decay[i].of[c][n];", "carry.of[c][n] = 0.0f;"),
    (TWO, "i = mark * kMarkEvery; i < row; ++i", "i = mark * kMarkEvery; i < row - 1; ++i"),
    (TWO, "    if (dropped(w, row)) decay = States{};\n", ""),
    (TWO, "length - 1 - chunk * kChunk, -1", "length - chunk * kChunk, -1"),
    (TWO, "k = 1; k < kParts", "k = 2; k < kParts"),
    (TWO, "carry = share = States{};", "carry = States{};"),
    (replace(TWO, events=0), "fmaf(share.x, carry.of[0][n], own.x)", "own.x"),
]


@pytest.mark.parametrize(("kernel", "text", "instead"), FAULTS)
def test_a_broken_kernel_is_found_out(kernel, text, instead, emulate, root, tmp_path):
    source = (root / "kernels" / "cuda" / "scan_backward.cu").read_text()
    assert source.count(text) == 1
    broken = tmp_path / "scan_backward.cu"
    broken.write_text(source.replace(text, instead))
    case = Case(75, 64, batch=1, optional=EVERYTHING if kernel.events else EVERYTHING[1:])
    whole, harness = Harness(emulate, root, kernel), Harness(emulate, root, kernel, broken)
    if "share" in text:
        # what flows over the borders of spans must not fade before it gets there
        whole.spans = harness.spans = 3
        whole.scales = harness.scales = {"A": 0.01}
    _, right = whole.run(case)
    harness.finite = False
    results = [harness.run(case, (seed,))[1] for seed in range(6)]
    # what the reference would not forgive either
    distance = [
        (result[name] - right[name]).norm() / right[name].norm() for result in results for name in right
    ]
    assert any(not error <= LIMITS["bf16"] for error in distance)
