"""RMSNorm and the fused addition against the formula in fp64."""

from __future__ import annotations

import pytest
import torch

from vlm.ops import add_rms_norm, rms_norm


def formula(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 64), (3, 192)])
def test_equals_the_formula(shape, relative_error):
    leaves = [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])]
    leaves = [v.double().requires_grad_() for v in leaves]
    douts = [torch.randn(shape).double() for _ in range(2)]
    stream = leaves[0] + leaves[1]
    truth = torch.autograd.grad([formula(stream, leaves[2], 1e-5), stream], leaves, douts)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        values = [v.detach().to(dtype).requires_grad_() for v in leaves]
        outputs = add_rms_norm(*values)
        assert relative_error(outputs[0], formula(stream, leaves[2], 1e-5)) < limit
        assert relative_error(outputs[1], stream) < limit
        gradients = torch.autograd.grad(outputs, values, [d.to(dtype) for d in douts])
        for a, b in zip(gradients, truth, strict=True):
            assert relative_error(a, b) < limit


def test_the_residual_stays_fp32_where_bf16_would_lose_it():
    x, weight = torch.full((1, 4), 2.0**-9, dtype=torch.bfloat16), torch.ones(4)
    residual = torch.ones(1, 4)
    normed, stream = add_rms_norm(x, residual, weight)
    assert normed.dtype == torch.bfloat16 and stream.dtype == torch.float32
    assert torch.equal(stream, torch.full((1, 4), 1 + 2.0**-9))
    first, start = add_rms_norm(x, None, weight)
    assert start.dtype == torch.float32 and torch.equal(start, x.float())
    assert torch.equal(first, rms_norm(x, weight))


def test_eps_counts():
    x = torch.full((1, 4), 1e-3)
    assert torch.allclose(rms_norm(x, torch.ones(4), eps=3e-6), torch.full((1, 4), 0.5))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"weight must be \(4,\)"):
        rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="residual must have x's shape"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(4))
