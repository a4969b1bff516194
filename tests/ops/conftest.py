"""Backends to run every proof on, and the comparisons of the contract."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlm.ops import cpu_library
from vlm.ops.backends import VARIABLE
from vlm.ops.cuda import driver as cuda_driver
from vlm.ops.cuda import library as cuda_library


@pytest.fixture(params=["reference", "chunked", "cpu"])
def scan_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation in turn, forced."""
    if request.param == "cpu" and not cpu_library.available(torch.float32):
        pytest.skip(f"no C++ kernels: {cpu_library.unavailable_reason(torch.float32)}")
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare relative to the expected tensor's largest magnitude; an expected zero tensor must be zero."""

    def check(name: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
        assert actual is not None, f"{name}: missing"
        assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
        assert torch.isfinite(actual).all(), f"{name}: not finite"
        scale = expected.abs().max().item()
        error = (actual.double() - expected.double()).abs().max().item()
        assert error <= tolerance * scale, f"{name}: off by {error:.3g} of {scale:.3g}, allowed {tolerance:g}"

    return check


@pytest.fixture(params=["reference", "chunked", "cpu-portable", "cpu-v3", "cpu-v4"])
def every_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation, and each instruction set that this processor has, on memory filled with NaN."""
    name, _, isa = request.param.partition("-")
    if name == "cpu":
        if not cpu_library.available(torch.float32):
            pytest.skip(f"no C++ kernels: {cpu_library.unavailable_reason(torch.float32)}")
        if cpu_library.LEVELS[isa] > cpu_library.library().vlm_best_level():
            pytest.skip(f"this processor lacks {isa}")
        monkeypatch.setenv(cpu_library.ISA_VARIABLE, isa)
    monkeypatch.setenv(VARIABLE, name)
    # fills torch.empty with NaN; the suite's conftest switches it off again
    torch.use_deterministic_algorithms(True)
    return request.param


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """The error's norm relative to the truth's norm."""

    def measure(actual: Tensor, truth: Tensor) -> float:
        assert actual.shape == truth.shape
        assert torch.isfinite(actual).all(), "not finite"
        difference = (actual.double() - truth.double()).norm().item()
        return difference / max(truth.double().norm().item(), 1e-30)

    return measure


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """The library that plays the driver."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the fake driver")
    built = tmp_path_factory.mktemp("fake") / "libfake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.cpp")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(built)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(built))
    library.fake_log.restype = ctypes.c_char_p
    library.fake_reset.argtypes = (ctypes.c_uint64,)
    return library


@pytest.fixture
def driver(fake):
    fake.fake_reset(ctypes.sizeof(cuda_library.ProbeArgument))
    found = cuda_driver.Driver(fake)
    yield found
    fake.fake_fail(b"", 0)
    assert fake.fake_depth() == 0, "a context was left current"


@pytest.fixture
def image(fixtures) -> bytes:
    return (fixtures / "cuda" / "probe-sm_90.cubin").read_bytes()
