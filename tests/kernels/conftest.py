"""Builds kernels for the emulated GPU, and runs them on memory where every stray access shows."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


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
    built: dict[tuple[object, ...], Emulated] = {}

    def build(source: Path, entry: str, problem: str, **macros: object) -> Emulated:
        key = (source, entry, problem, *sorted((k, str(v)) for k, v in macros.items()))
        if key not in built:
            target = folder / f"{source.stem}-{len(built)}.so"
            command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
            # lanes are left by longjmp to another stack, which the fortified one takes for an error
            command += ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
            command += [f"-I{KERNELS / 'emulation'}", f"-I{KERNELS / 'cuda'}"]
            command += [f'-DVLM_SOURCE="{source}"', f"-DVLM_ENTRY={entry}", f"-DVLM_PROBLEM={problem}"]
            command += [f"-D{name}={value}" for name, value in macros.items()]
            command += [str(KERNELS / "emulation" / "driver.cpp"), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
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
