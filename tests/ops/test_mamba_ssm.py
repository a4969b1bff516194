"""mamba-ssm as a backend: two calls of its extension and flips. A loop as strict plays the extension."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from vlm.errors import KernelError
from vlm.ops import backends, selective_scan
from vlm.ops.selective_scan import reference
from vlm.ops.selective_scan.reference import Scan

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def as_scan(u, delta, A, B, C, D, z, bias, softplus):
    """What the extension demands of its arguments, and the same scan in fp64."""
    batch, channels, length = u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype and delta.shape == u.shape and z is None
    assert A.dtype == torch.float32 and A.shape[0] == channels
    assert B.shape == C.shape == (batch, B.shape[1], A.shape[1], length) and channels % B.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (u, delta, B, C)) and A.is_contiguous()
    for vector in (D, bias):
        assert vector is None or (vector.dtype == torch.float32 and vector.shape == (channels,))

    def wide(x):
        return None if x is None else x.double()

    sequences = (x.double().movedim(-1, 1) for x in (u, delta))
    rows = (x.double().movedim(-1, 1) for x in (B, C))
    return Scan(*sequences, A.double(), *rows, wide(D), wide(bias), None, None, softplus, False)


@pytest.fixture
def extension(monkeypatch):
    """Let ``VLM_SCAN_BACKEND=mamba_ssm`` serve on the CPU."""

    def fwd(*arguments):
        played.calls += 1
        u, A = arguments[0], arguments[2]
        y, last, _ = reference.forward(as_scan(*arguments), save=False)
        states = torch.full((*u.shape[:2], 1, 2 * A.shape[1]), float("nan"))
        states[:, :, -1, 1::2] = last.float()
        return y.movedim(1, -1).to(u.dtype).contiguous(), states

    def bwd(*arguments):
        *inputs, dout, states, out, dz, softplus, recompute = arguments
        u = inputs[0]
        assert dout.dtype == u.dtype and dout.stride(-1) == 1 and out.shape == u.shape
        assert states.dtype == torch.float32 and dz is None and recompute is False
        g = reference.backward(dout.double().movedim(-1, 1), as_scan(*inputs, softplus))
        du, ddelta = (x.movedim(1, -1).to(u.dtype).contiguous() for x in (g.u, g.delta))
        dB, dC = (x.movedim(1, -1).float().contiguous() for x in (g.B, g.C))
        dD, dbias = (None if x is None else x.float() for x in (g.D, g.bias))
        return du, ddelta, g.A.float(), dB, dC, dD, dbias

    played = SimpleNamespace(fwd=fwd, bwd=bwd, calls=0)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", played)
    monkeypatch.setattr(backends, "_check_mamba_ssm", lambda *_: None)
    return played


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", LIMITS)
def test_both_directions_and_their_gradients(extension, dtype, monkeypatch):
    torch.manual_seed(0)
    u_f, u_b, z, delta_f, delta_b = (torch.randn(2, 19, 6).to(dtype) for _ in range(5))
    bc_f, bc_b = (torch.randn(2, 19, 8).to(dtype) for _ in range(2))
    A_f, A_b = (-torch.rand(6, 4) - 0.1 for _ in range(2))
    vectors = [torch.randn(6) for _ in range(4)]
    inputs = [u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, A_f, A_b, *vectors]
    dout = torch.randn(2, 19, 6).to(dtype)

    def compute(name, leaves, gradient):
        monkeypatch.setenv(backends.VARIABLE, name)
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = torch.ops.vlm.bi_scan(*leaves, None, None, None, True)[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    found = compute("mamba_ssm", inputs, dout)
    assert extension.calls == 4  # the backward pass runs the forward kernel again
    expected = compute("reference", [x.double() for x in inputs], dout.double())
    for mine, truth, given in zip(found, expected, [dout, *inputs], strict=True):
        assert mine.dtype == given.dtype
        assert error(mine, truth) < LIMITS[dtype]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_direction_with_groups_gate_and_last_state(extension, dtype, reverse, monkeypatch):
    torch.manual_seed(1)
    u, delta, z = (torch.randn(2, 6, 11).to(dtype) for _ in range(3))
    B, C = (torch.randn(2, 3, 4, 11).to(dtype) for _ in range(2))
    A, D, bias = -torch.rand(6, 4), torch.randn(6), torch.randn(6)

    def compute(name, *inputs):
        monkeypatch.setenv(backends.VARIABLE, name)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, last = selective_scan(*leaves, True, True, reverse=reverse)
        return [out.detach(), last, *torch.autograd.grad(out.double().cos().sum(), leaves)]

    inputs = (u, delta, A, B, C, D, z, bias)
    found = compute("mamba_ssm", *inputs)
    expected = compute("reference", *(x.double() for x in inputs))
    assert found[1].dtype == torch.float32
    for mine, truth in zip(found, expected, strict=True):
        assert error(mine, truth) < 2 * LIMITS[dtype]


def test_what_it_has_no_form_for_is_refused(extension, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "mamba_ssm")
    x, rows = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    with pytest.raises(KernelError, match="mamba_ssm has no initial_state or segment_starts"):
        selective_scan(x, x, -torch.ones(2, 4), rows, rows, segment_starts=torch.tensor([True, False, True]))


def test_only_the_scans_go_there(extension, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "mamba_ssm")
    serving = {op: backends.backend(op, "cuda", torch.bfloat16) for op in backends.OPERATORS}
    assert serving == {
        "selective_scan": "mamba_ssm",
        "bi_scan": "mamba_ssm",
        "conv2": "chunked",
        "add_rms_norm": "chunked",
    }
