"""Official numbers, loaded once, and the comparison that the tolerance is about."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


class Official(NamedTuple):
    """One file of official numbers: its tensors, the weights among them, and how it was made."""

    tensors: dict[str, Tensor]
    state_dict: dict[str, Tensor]
    config: dict[str, Any]


@functools.cache
def _load(name: str) -> Official:
    with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    state = {
        key.removeprefix("state_dict/"): value
        for key, value in tensors.items()
        if key.startswith("state_dict/")
    }
    return Official(tensors, state, config)


@pytest.fixture(scope="session")
def official() -> Callable[[str], Official]:
    return _load


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Compare with official numbers: within a share of the tensor's largest magnitude."""

    def check(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
        assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        scale = expected.abs().max().item()
        error = (found.detach().float() - expected.float()).abs().max().item()
        assert error <= tolerance * scale, (
            f"error {error:.3g}, {error / max(scale, 1e-30):.3g} of {scale:.3g}"
        )

    return check


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """The official tiny retrieval model, loaded as a user would."""
    from vlm.models import from_official

    torch.manual_seed(0)
    return from_official(_load("umt_videomamba_tiny").state_dict, overrides={"num_attention_heads": 4})[0]
