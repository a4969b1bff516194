"""Backends to run every proof on, and the comparisons of the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlm.ops import cpu_library
from vlm.ops.backends import VARIABLE


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
