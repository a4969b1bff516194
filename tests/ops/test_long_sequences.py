"""The sequences of 8 and 64 frames of 224 x 224 through every implementation, against one fp64 truth."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from vlm.ops import selective_scan
from vlm.ops.backends import VARIABLE

DIM, STATES = 18, 16


def inputs(length):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = -torch.arange(1.0, STATES + 1, dtype=torch.float64).repeat(DIM, 1)
    sequences = [draw(1, DIM, length) for _ in range(3)]
    return [*sequences, A, draw(1, STATES, length), draw(1, STATES, length), draw(DIM), draw(DIM) - 4]


def compute(length, dtype):
    """Return the output and all gradients; steps are small, so that states remember thousands of steps."""
    values = [value.to(dtype).requires_grad_() for value in inputs(length)]
    u, delta, z, A, B, C, D, bias = values
    out = selective_scan(u, delta, A, B, C, D, z, bias, True)
    return [
        out.detach(),
        *torch.autograd.grad(out, values, torch.cos(torch.arange(length).to(dtype)).expand_as(out)),
    ]


@functools.cache
def truth(length):
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        return compute(length, torch.float64)
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


@pytest.mark.parametrize("length", [1569, 12545])
def test_long_sequences_are_within_the_contract(length, every_kernel, relative_error):
    found = compute(length, torch.float32)
    for place, (mine, expected) in enumerate(zip(found, truth(length), strict=True)):
        assert relative_error(mine, expected) < (5e-5 if place else 1e-5), place
