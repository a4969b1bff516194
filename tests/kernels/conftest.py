"""Builds kernels for the emulated GPU, and runs them on memory where every stray access shows."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels import extensions as played
from vlm.ops import backends
from vlm.ops.backends import VARIABLE
from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import trial as cuda_trial
from vlm.ops.cuda.registry import Instantiation

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
PROBLEMS = {
    "vlm_scan_forward": "ScanForward",
    "vlm_scan_backward": "ScanBackward",
    "vlm_scan_backward_carry": "ScanBackward",
    "vlm_sum": "PartialSums",
    "vlm_conv_forward": "ConvForward",
    "vlm_conv_backward": "ConvBackward",
    "vlm_norm_forward": "NormForward",
    "vlm_norm_backward": "NormBackward",
}
NUMBERS = {"vlm_norm_geometry": 5}


class Emulated:
    """One kernel's library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.vlm_problem_bytes.restype = ctypes.c_int64
        self.library.vlm_emulate.restype = ctypes.c_char_p
        self.library.vlm_emulate.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]

    def __call__(
        self, problem: ctypes.Structure, *, grid: int, threads: int, shared: int = 0, seed: int = 0
    ) -> None:
        """Run one launch; RuntimeError says what the emulator found."""
        assert self.library.vlm_problem_bytes() == ctypes.sizeof(problem)
        error = self.library.vlm_emulate(ctypes.byref(problem), grid, threads, shared, seed)
        if error is not None:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """Return ``build(source, entry, problem, **macros)``, which compiles a kernel at its first use."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("emulated")
    common = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Winvalid-pch"]
    # lanes are left by longjmp to another stack, which the fortified one takes for an error
    common += ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    common += [f"-I{KERNELS / 'emulation'}", f"-I{KERNELS / 'cuda'}"]
    emulator = folder / "emulator.h"  # parsed once: it takes as long as a kernel

    def compile(*arguments: object) -> None:
        done = subprocess.run([*common, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    built: dict[tuple[object, ...], Emulated] = {}

    def build(source: Path, entry: str, problem: str, **macros: object) -> Emulated:
        key = (source, entry, problem, *sorted((k, str(v)) for k, v in macros.items()))
        if key not in built:
            target = folder / f"{source.stem}-{len(built)}.so"
            if not built:
                emulator.write_text('#define VLM_EMULATION\n#include "device.h"\n')
                compile("-x", "c++-header", emulator, "-o", f"{emulator}.gch")
            chosen = [f'-DVLM_SOURCE="{source}"', f"-DVLM_ENTRY={entry}", f"-DVLM_PROBLEM={problem}"]
            chosen += [f"-D{name}={value}" for name, value in macros.items()]
            driver = KERNELS / "emulation" / "driver.cpp"
            compile("-shared", "-include", emulator, *chosen, driver, "-o", target)
            built[key] = Emulated(target)
        return built[key]

    return build


class Output:
    """A tensor of NaN between guards of NaN; an odd guard puts it at an address that is not aligned."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32, guard: int = 64) -> None:
        self.shape, self.guard = shape, guard
        self.room = torch.full((2 * guard + torch.Size(shape).numel(),), float("nan"), dtype=dtype)

    def address(self) -> int:
        """Where the kernel writes."""
        return self.room[self.guard :].data_ptr()

    def value(self) -> torch.Tensor:
        """Return what was written: everything inside, nothing outside."""
        before, after = self.room[: self.guard], self.room[-self.guard :]
        assert before.isnan().all() and after.isnan().all(), "wrote outside"
        inside = self.room[self.guard : -self.guard].view(self.shape)
        assert inside.isfinite().all(), f"{(~inside.isfinite()).sum()} of {inside.numel()} are not finite"
        return inside


@pytest.fixture(scope="session")
def output() -> type[Output]:
    """Return the class of poisoned outputs."""
    return Output


@pytest.fixture(scope="session")
def in_wider_rows() -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Return ``place(values, pad)``: the same values in rows of NaN that are 2 ``pad`` elements longer."""

    def place(values: torch.Tensor, pad: int) -> torch.Tensor:
        *batch, rows, width = values.shape
        room = torch.full((*batch, rows + 1, width + 2 * pad), float("nan"), dtype=values.dtype)
        view = room[..., :rows, pad : pad + width]
        view.copy_(values)
        return view

    return place


class EmulatedKernel:
    """What ``cuda_driver.Kernel`` is to the calls."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        self.launches: list[int] = []

    def constant(self, name: str) -> bytes:
        """Return the numbers that a module says of itself."""
        return bytes((ctypes.c_int64 * NUMBERS.get(name, 4)).in_dll(self.emulated.library, name))

    def launch(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, argument: ctypes.Structure
    ) -> None:
        """Run at once what a GPU would queue."""
        self.launches.append(grid[0])
        self.emulated(argument, grid=grid[0], threads=block[0], shared=shared_bytes)


class Gpu:
    """An emulated GPU behind the operators.

    Attributes:
        multiprocessors: How many it says it has.
        used: The instantiations asked for, in order.
        kernels: Those built.
    """

    def __init__(self, emulate: Callable[..., Emulated]) -> None:
        self.multiprocessors = 1
        self.used: list[Instantiation] = []
        self._emulate = emulate
        self.kernels: dict[Instantiation, EmulatedKernel] = {}

    def kernel(self, wanted: Instantiation, _device: object) -> EmulatedKernel:
        """Return a kernel, built at its first use."""
        self.used.append(wanted)
        if wanted not in self.kernels:
            source, problem = KERNELS / "cuda" / wanted.source, f"vlm::{PROBLEMS[wanted.entry]}"
            built = self._emulate(source, wanted.entry, problem, **dict(wanted.defines))
            self.kernels[wanted] = EmulatedKernel(built)
        return self.kernels[wanted]


@pytest.fixture
def gpu(emulate: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Put an emulated GPU behind ``VLM_SCAN_BACKEND=cuda`` for tensors on the CPU."""
    emulated = Gpu(emulate)
    monkeypatch.setattr(cuda_library, "kernel", emulated.kernel)
    monkeypatch.setattr(cuda_library, "available", lambda _device: True)
    monkeypatch.setattr(cuda_arguments, "on_gpu", lambda _tensor: True)
    monkeypatch.setattr(cuda_arguments, "multiprocessors", lambda _device: emulated.multiprocessors)
    monkeypatch.setattr(backends, "_check_cuda", lambda *_: None)
    cuda_trial.forget()
    yield emulated
    cuda_trial.forget()


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """Let PyTorch multiply matrices of fp32 in tf32."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    """Return a function that runs something by the CUDA kernels and by PyTorch."""

    def run(compute: Callable[[], Any]) -> list[Any]:
        results = []
        for name in ("cuda", "chunked"):
            monkeypatch.setenv(backends.VARIABLE, name)
            results.append(compute())
        return results

    return run


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports one of the benchmark folder's modules."""
    monkeypatch.syspath_prepend(str(KERNELS / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let PyTorch play the published extensions, and count the scans."""

    def counted(*arguments: Any) -> Any:
        scan.calls += 1
        return played.scan_forward(*arguments)

    scan = SimpleNamespace(fwd=counted, bwd=played.scan_backward, calls=0)
    conv = SimpleNamespace(causal_conv1d_fwd=played.conv_forward, causal_conv1d_bwd=played.conv_backward)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", scan)
    monkeypatch.setitem(sys.modules, "causal_conv1d_cuda", conv)
    return scan


@pytest.fixture
def part(benchmark):
    """Return a function that imports a part of the check."""
    return lambda name: benchmark(f"gpu.{name}")


@pytest.fixture
def program(benchmark, part, monkeypatch):
    """The program, on one small size."""
    program = benchmark("gpu_check")
    problems = part("problems")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(problems, "LOADS", ((1, 2),))
    monkeypatch.setattr(problems, "SIZES", {"Ti": problems.Size("tiny", 16)})
    return program


@pytest.fixture
def session(part):
    """A small session on the CPU."""

    def make(ours="cpu", **options):
        device = part("device").Device(torch.device("cpu"))
        return part("session").Session(device, ours, seconds=0.0, is_small=True, **options)

    return make
