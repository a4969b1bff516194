"""Placeholder until the kernels land: nothing is available."""

from __future__ import annotations

import torch


def available(dtype: torch.dtype) -> bool:
    """Return whether the C++ kernels can serve tensors of ``dtype``."""
    return False


def unavailable_reason(dtype: torch.dtype) -> str:
    """Return why they cannot."""
    return "not built"


MAX_TAPS = 4


def fits(num_states: int) -> bool:
    """Return whether the kernels take so many states."""
    return False
