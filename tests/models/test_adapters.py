"""Low-rank adapters on a mixer's projections: their gradients are those of dense weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vlm.models.mamba_block import BidirectionalMixer

PROJECTIONS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")


class LowRank(nn.Module):
    """base(x) + B A x."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@pytest.fixture
def dense():
    torch.manual_seed(0)
    mixer = BidirectionalMixer(10, state_size=4, conv_width=4, expand=2, dt_rank=3, bidirectional=True)
    for name, parameter in mixer.double().named_parameters():
        if name not in ("A_log", "A_b_log"):
            nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.fixture
def tokens():
    return torch.randn(2, 37, 10, dtype=torch.float64)


def adapted(mixer, *names):
    mixer = copy.deepcopy(mixer).requires_grad_(False)
    for name in names:
        setattr(mixer, name, LowRank(getattr(mixer, name)))
    return mixer


@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_adapter_is_silent_at_zero_and_heard_after(dense, tokens, name):
    mixer = adapted(dense, name)
    expected = dense(tokens)
    torch.testing.assert_close(mixer(tokens), expected, rtol=1e-12, atol=1e-12)
    nn.init.normal_(getattr(mixer, name).B, std=0.3)
    assert (mixer(tokens) - expected).norm() > 1e-2 * expected.norm()


def test_gradients_are_those_of_the_dense_weights(dense, tokens):
    """With W = base + B A, the chain rule gives dB = dW A' and dA = B' dW."""
    mixer = adapted(dense, *PROJECTIONS)
    for name in PROJECTIONS:
        nn.init.normal_(getattr(mixer, name).B, std=0.3)
        adapter = getattr(mixer, name)
        with torch.no_grad():
            getattr(dense, name).weight += adapter.B @ adapter.A
    dout = torch.randn_like(tokens)
    found, expected = mixer(tokens), dense(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (found * dout).sum().backward()
    (expected * dout).sum().backward()
    trained = {name for name, parameter in mixer.named_parameters() if parameter.grad is not None}
    assert trained == {f"{name}.{part}" for name in PROJECTIONS for part in "AB"}
    for name in PROJECTIONS:
        adapter, dW = getattr(mixer, name), getattr(dense, name).weight.grad
        torch.testing.assert_close(adapter.B.grad, dW @ adapter.A.T, rtol=1e-9, atol=1e-9, msg=name)
        torch.testing.assert_close(adapter.A.grad, adapter.B.T @ dW, rtol=1e-9, atol=1e-9, msg=name)


def test_gradients_are_the_slopes_of_the_loss(dense, tokens):
    mixer = adapted(dense, *PROJECTIONS)
    for name in PROJECTIONS:
        nn.init.normal_(getattr(mixer, name).B, std=0.3)
    dout, step = torch.randn_like(tokens), 1e-6

    def loss():
        return (mixer(tokens) * dout).sum()

    loss().backward()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if parameter.grad is None:
                continue
            along = torch.randn_like(parameter)
            parameter += step * along
            above = loss()
            parameter -= 2 * step * along
            below = loss()
            parameter += step * along
            slope = (parameter.grad * along).sum()
            torch.testing.assert_close((above - below) / (2 * step), slope, rtol=1e-6, atol=1e-6, msg=name)
