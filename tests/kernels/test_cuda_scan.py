"""The CUDA scan on the emulated GPU, against the fp64 reference on the same rounded inputs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch

from vlm.ops.selective_scan import reference
from vlm.ops.selective_scan.reference import CHECKPOINT_EVERY, Scan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 3e-3}
POINTERS = ("u", "delta", "weight", "A", "B", "C", "D", "bias", "initial", "last", "kept")
STRIDES = ("u_batch", "u_row", "delta_batch", "delta_row", "bc_batch", "bc_row", "bc_group")
# elements of poison around every output
GUARD = 64


class Direction(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in POINTERS), *((n, ctypes.c_int64) for n in STRIDES)]


class Problem(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "length", "channels", "groups", "softplus", "reverse")),
        ("segments", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("z_batch", ctypes.c_int64),
        ("z_row", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("direction", Direction * 2),
    ]


@dataclass(frozen=True)
class Kernel:
    """One compilation."""

    io: str = "fp32"
    states: int = 16
    directions: int = 1
    rank: int = 0
    aligned: int = 1
    events: int = 0
    split: int = 1
    polynomial: int = 0


@dataclass(frozen=True)
class Case:
    """One problem."""

    length: int
    channels: int = 40
    batch: int = 2
    groups: int = 1
    reverse: bool = False
    softplus: bool = True
    # which of the optional inputs are given, which of the optional outputs are asked for
    optional: tuple[str, ...] = ("D", "bias", "z", "last")
    seed: int = 0


EVENTS = ("segments", "initial", "kept", "total", "D", "bias", "z", "last")


class Output:
    """A tensor of NaN between guards of NaN."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.room = torch.full((2 * GUARD + torch.Size(shape).numel(),), float("nan"), dtype=dtype)

    def address(self) -> int:
        return self.room[GUARD:].data_ptr()

    def value(self, finite: bool) -> torch.Tensor:
        """What was written: everything inside, nothing outside."""
        assert self.room[:GUARD].isnan().all() and self.room[-GUARD:].isnan().all(), "wrote outside"
        inside = self.room[GUARD:-GUARD].view(self.shape)
        if finite:
            assert inside.isfinite().all(), f"{(~inside.isfinite()).sum()} of {inside.numel()} are not finite"
        return inside.double()


def strided(values, pad):
    """The values as rows of a wider tensor of NaN."""
    batch, length, width = values.shape
    room = torch.full((batch, length + 1, width + 2 * pad), float("nan"), dtype=values.dtype)
    view = room[:, :length, pad : pad + width]
    view.copy_(values)
    return view


def draw_direction(kernel, case):
    """One direction's inputs in the types that the kernel takes."""
    dtype = DTYPES[kernel.io]
    pad = 16 if kernel.aligned else 3
    rows = (case.batch, case.length)
    width = kernel.rank + 2 * case.groups * kernel.states
    # what bf16 holds tf32 holds too: fp32 products of such numbers are exact
    factors = torch.bfloat16 if kernel.rank else dtype
    x_dbl = strided(torch.randn(*rows, width).to(factors).to(dtype), pad)
    bc = x_dbl[..., kernel.rank :].unflatten(-1, (2, case.groups, kernel.states))
    inputs = {
        "u": strided(torch.randn(*rows, case.channels).to(dtype), pad),
        "A": -torch.rand(case.channels, kernel.states).add(0.05) * torch.arange(1, kernel.states + 1),
        "B": bc[:, :, 0],
        "C": bc[:, :, 1],
        "D": torch.randn(case.channels),
        "bias": torch.randn(case.channels) - 1,
        "initial": torch.randn(case.batch, case.channels, kernel.states),
    }
    if kernel.rank:
        inputs["delta"] = x_dbl[..., : kernel.rank]
        inputs["weight"] = (torch.randn(case.channels, kernel.rank) / kernel.rank**0.5).to(factors).to(dtype)
    else:
        inputs["delta"] = strided(torch.randn(*rows, case.channels).to(dtype), pad)
    if not case.softplus:
        inputs["delta"].copy_(torch.rand(inputs["delta"].shape).to(dtype) / 4)
    optional = {"D", "bias", "initial"} - set(case.optional)
    return {name: value for name, value in inputs.items() if name not in optional}


def truth(case, directions, z, segments):
    """Gated sum, ungated sum, last states and kept states in fp64."""
    results = []
    for number, inputs in enumerate(directions):
        wide = {name: value.double() for name, value in inputs.items()}
        delta = wide["delta"] if "weight" not in wide else wide["delta"] @ wide["weight"].T
        reverse = number == 1 or case.reverse
        scan = Scan(
            wide["u"],
            delta,
            wide["A"],
            wide["B"],
            wide["C"],
            wide.get("D"),
            wide.get("bias"),
            wide.get("initial"),
            segments,
            case.softplus,
            reverse,
        )
        results.append(reference.forward(scan, save=True))
    total = torch.stack([y for y, _, _ in results]).sum(0)
    out = total if z is None else total * torch.nn.functional.silu(z.double())
    return {
        "out": out,
        "total": total,
        **{f"last{i}": last for i, (_, last, _) in enumerate(results)},
        **{f"kept{i}": kept for i, (_, _, kept) in enumerate(results)},
    }


class Harness:
    """Runs one case of one kernel."""

    def __init__(self, emulate, root, kernel, source=None):
        macros = {f"VLM_{name.upper()}": value for name, value in vars(kernel).items()}
        source = source or root / "kernels" / "cuda" / "scan_forward.cu"
        self.kernel = kernel
        self.finite = True
        self.scales: dict[str, float] = {}
        self.poison: tuple[int, int, int] | None = None
        self.emulated = emulate(source, "vlm_scan_forward", "vlm::ScanForward", **macros)
        geometry = (ctypes.c_int64 * 4).in_dll(self.emulated.library, "vlm_scan_forward_geometry")
        self.threads, self.shared, self.tile_channels, self.slots = geometry

    def grid(self, case):
        per_group = -(-case.channels // case.groups // self.tile_channels)
        return case.batch * -(-case.groups * per_group // self.slots)

    def run(self, case, seeds=(0,)):
        """Return expected and actual outputs; every seed must give the same bits."""
        torch.manual_seed(case.seed)
        directions = [draw_direction(self.kernel, case) for _ in range(self.kernel.directions)]
        dtype = DTYPES[self.kernel.io]
        rows = (case.batch, case.length, case.channels)
        z = (
            strided(torch.randn(rows).to(dtype), 16 if self.kernel.aligned else 3)
            if "z" in case.optional
            else None
        )
        for inputs in (*directions, {} if z is None else {"z": z}):
            for name in inputs.keys() & self.scales.keys():
                inputs[name].mul_(self.scales[name])
        if self.poison is not None:
            directions[0]["delta"][self.poison] = float("nan")
        segments = None
        if "segments" in case.optional:
            segments = (torch.rand(rows[:2]) < 0.1).cumsum(1).to(torch.int32)
        results = [self._launch(case, directions, z, segments, seed) for seed in seeds]
        for other in results[1:]:
            assert all(torch.equal(value, other[name]) for name, value in results[0].items())
        return truth(case, directions, z, segments), results[0]

    def _launch(self, case, directions, z, segments, seed):
        dtype = DTYPES[self.kernel.io]
        rows = (case.batch, case.length, case.channels)
        states = self.kernel.states
        problem = Problem(*rows, case.groups, case.softplus, case.reverse)
        outputs = {"out": Output(*rows, dtype=dtype)}
        problem.out = outputs["out"].address()
        if "total" in case.optional or (len(directions) == 2 and dtype != torch.float32):
            outputs["total"] = Output(*rows, dtype=dtype)
            problem.total = outputs["total"].address()
        if z is not None:
            problem.z, problem.z_batch, problem.z_row = z.data_ptr(), *z.stride()[:2]
        if segments is not None:
            problem.segments = segments.data_ptr()
        for number, inputs in enumerate(directions):
            direction = problem.direction[number]
            for name, value in inputs.items():
                setattr(direction, name, value.data_ptr())
            for name in ("u", "delta"):
                setattr(direction, f"{name}_batch", inputs[name].stride(0))
                setattr(direction, f"{name}_row", inputs[name].stride(1))
            direction.bc_batch, direction.bc_row, direction.bc_group = inputs["B"].stride()[:3]
            chunks = -(-case.length // CHECKPOINT_EVERY)
            for name, shape in (
                ("last", (case.batch, case.channels, states)),
                ("kept", (case.batch, chunks, states, case.channels)),
            ):
                if name in case.optional:
                    outputs[f"{name}{number}"] = Output(*shape)
                    setattr(direction, name, outputs[f"{name}{number}"].address())
        self.emulated(problem, grid=self.grid(case), threads=self.threads, shared=self.shared, seed=seed)
        return {name: output.value(self.finite) for name, output in outputs.items()}


@pytest.fixture
def check(emulate, root):
    """``check(kernel, case, ...)``: everything that was asked for is within the contract."""

    def run(kernel, *cases, seeds=(0,)):
        harness = Harness(emulate, root, kernel)
        for case in cases:
            expected, actual = harness.run(case, seeds)
            assert {name.rstrip("01") for name in actual} >= {"total", "last", "kept"} & set(case.optional)
            for name, value in actual.items():
                error = (value - expected[name]).norm() / expected[name].norm()
                limit = LIMITS[kernel.io] if name in ("out", "total") else 1e-5
                assert error <= limit, f"{name} of {case}: {error:.2e}"

    return run


LENGTHS = (1, 2, 15, 16, 17, 31, 63, 75, 197)


@pytest.mark.parametrize("io", DTYPES)
def test_one_direction(io, check):
    cases = [Case(length, reverse=length % 2 == 0) for length in LENGTHS]
    check(Kernel(io), *cases, *(replace(case, reverse=not case.reverse) for case in cases[-4:]))


@pytest.mark.parametrize("io", DTYPES)
def test_two_directions(io, check):
    check(Kernel(io, directions=2), *(Case(length) for length in LENGTHS))


@pytest.mark.parametrize("io", ["fp32", "bf16"])
def test_any_number_of_channels(io, check):
    kernel = Kernel(io, directions=2, aligned=0, events=1)
    check(kernel, *(Case(33, channels) for channels in (1, 31, 32, 65)))
    check(kernel, Case(50, 35, optional=EVENTS), Case(197, 3, optional=EVENTS))


@pytest.mark.parametrize("states", [8, 16, 32, 64])
def test_states_groups_and_aligned_tails(states, check):
    kernel = Kernel("bf16", states, directions=2, events=1)
    check(kernel, Case(35, 72, optional=EVENTS), Case(20, 96, groups=3, optional=EVENTS), seeds=(1, 2))


@pytest.mark.parametrize("io", DTYPES)
def test_everything_optional(io, check):
    kernel = Kernel(io, events=1)
    for reverse in (False, True):
        check(kernel, *(Case(n, 32, reverse=reverse, optional=EVENTS) for n in (1, 32, 33, 75, 197)))
    # nothing asked for, nothing given
    check(kernel, Case(40, optional=()), Case(40, optional=(), softplus=False))


@pytest.mark.parametrize("io", DTYPES)
@pytest.mark.parametrize("rank", [16, 32, 48])
def test_delta_from_rank_rows(rank, io, check):
    check(Kernel(io, directions=2, rank=rank), *(Case(length, 72) for length in (1, 17, 75)))


@pytest.mark.parametrize("order", [1, 2])
def test_lanes_may_run_in_any_order(order, check):
    """Also says that results repeat to the bit."""
    kernel = Kernel("bf16", directions=2, events=1)
    check(kernel, Case(47, 64, optional=EVENTS, seed=order), seeds=range(6 * order, 6 * order + 6))


@pytest.mark.parametrize(
    ("split", "states", "directions"), [(2, 16, 2), (4, 8, 1), (4, 16, 2), (8, 16, 2), (8, 32, 1)]
)
def test_time_split_over_warps(split, states, directions, check):
    kernel = Kernel("fp32", states, directions=directions, events=1, split=split)
    check(kernel, *(Case(n, 36, batch=1, optional=EVENTS) for n in (1, 16, 63, 75, 197)), seeds=(3, 4))
    if directions == 1:
        check(kernel, Case(75, 64, batch=1, reverse=True, optional=EVENTS))


@pytest.mark.parametrize("split", [2, 4])
def test_time_split_over_few_halves(split, check):
    """Eight states of eight rows are fewer vectors than a warp has lanes."""
    kernel = Kernel("bf16", 8, directions=2, events=1, split=split)
    check(kernel, *(Case(n, 72, batch=1, optional=EVENTS) for n in (63, 197)), seeds=range(6))


@pytest.mark.parametrize("io", ["fp32", "bf16"])
def test_time_split_with_rank_rows(io, check):
    check(Kernel(io, directions=2, rank=32, split=4), *(Case(n, 32, batch=1) for n in (7, 75)))


@pytest.mark.parametrize("polynomial", [1, 4, 16])
def test_exponentials_by_polynomial(polynomial, check):
    kernel = Kernel("fp32", directions=2, events=1, polynomial=polynomial)
    check(kernel, *(Case(length, optional=EVENTS) for length in (1, 31, 75)))


@pytest.mark.parametrize("polynomial", [0, 16])
def test_extreme_inputs_stay_finite(polynomial, emulate, root):
    """Softplus far on both sides, gates that vanish, decays that do and that never do."""
    for io in ("fp32", "bf16"):
        harness = Harness(emulate, root, Kernel(io, directions=2, events=1, polynomial=polynomial))
        for scale in (1e-6, 1e3):
            harness.scales = {"A": scale, "delta": 30.0, "z": 40.0}
            expected, actual = harness.run(Case(50, 32, optional=EVENTS))
            for name, value in actual.items():
                error = (value - expected[name]).norm() / expected[name].norm()
                assert error <= LIMITS[io], f"{name}: {error:.2e}"


@pytest.mark.parametrize("polynomial", [0, 16])
def test_nan_stays_in_its_channel_and_row(polynomial, emulate, root):
    for io in ("fp32", "bf16"):
        harness = Harness(emulate, root, Kernel(io, directions=2, polynomial=polynomial))
        harness.poison = (0, 20, 5)
        harness.finite = False
        case = Case(40, 32, optional=("D", "z", "bias"))
        _, actual = harness.run(case)
        bad = torch.zeros(actual["out"].shape, dtype=torch.bool)
        bad[0, 20:, 5] = True
        assert torch.equal(actual["out"].isnan(), bad)


# what each synchronisation is there for shows when it is taken out
OMISSIONS = [
    ("    wait_copies<1>();\n    sync_warp();", "    wait_copies<1>();"),
    (
        "    const float *bc = widen(w, raw.bc());\n    sync_warp();",
        "    const float *bc = widen(w, raw.bc());",
    ),
    ("    wait_copies<0>();\n    sync_warp();", "    wait_copies<0>();"),
    ("    else finish<false>(w, tile, D);\n    sync_warp();", "    else finish<false>(w, tile, D);"),
    ("wait_copies<1>();", "wait_copies<2>();"),
    ("wait_copies<0>();", "wait_copies<1>();"),
    ("{ sync_named(w.meeting_barrier, 64 * kSplit); }", "{ (void)w; }"),
    ("  sync_named(w.split_barrier, 32 * kSplit);\n", ""),
    ("published)[tile % 2]", "published)[tile * 0]"),
]


@pytest.mark.parametrize(("text", "without"), OMISSIONS)
def test_a_kernel_that_does_not_wait_is_found_out(text, without, emulate, root, tmp_path):
    split = 2 if "split" in text or "published" in text else 1
    whole = (root / "kernels" / "cuda" / "scan_forward.cu").read_text()
    assert whole.count(text) == 1
    broken = tmp_path / "scan_forward.cu"
    broken.write_text(whole.replace(text, without))
    harness = Harness(emulate, root, Kernel("bf16", directions=2, split=split), broken)
    case = Case(90, 32, batch=1)
    _, right = Harness(emulate, root, harness.kernel).run(case)
    harness.finite = False
    results = [harness.run(case, (seed,))[1] for seed in range(8)]
    assert any(not torch.equal(result[name], right[name]) for result in results for name in right)
