"""RMSNorm and the fused addition against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

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


def draw(*shape, dtype=torch.float64):
    """Return x, residual and weight, which want gradients."""
    values = (
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.randn(shape[-1]).to(dtype),
    )
    return [v.requires_grad_() for v in values]


def test_gradcheck():
    x, residual, weight = draw(2, 3, 5)
    assert torch.autograd.gradcheck(lambda *v: add_rms_norm(*v, 1e-3), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, w: add_rms_norm(x, None, w), (x, weight))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_gradients_in_the_types_of_a_network(dtype, outputs, relative_error):
    """Half sequences beside an fp32 stream and weight; either output may be all that is used."""
    x, residual, weight = draw(3, 7, 24)
    given = [leaf.detach().to(t).requires_grad_() for leaf, t in ((x, dtype), (residual, torch.float32))]
    given.append(weight.detach().float().requires_grad_())
    wide = [leaf.detach().double().requires_grad_() for leaf in given]
    stream = wide[0] + wide[1]
    weigh = [torch.randn(3, 7, 24).to(t) for t in (dtype, torch.float32)]

    def gradients(results, leaves):
        total = sum((results[i] * weigh[i].to(results[i].dtype)).sum() for i in outputs)
        return torch.autograd.grad(total, leaves, allow_unused=True)

    found = gradients(add_rms_norm(*given), given)
    truth = gradients([formula(stream, wide[2], 1e-5), stream], wide)
    for mine, true, leaf in zip(found, truth, given, strict=True):
        if true is None:
            assert mine is None or not mine.any()
            continue
        assert mine.dtype == leaf.dtype
        assert relative_error(mine, true) < (2e-6 if leaf.dtype == torch.float32 else 4e-3)


def test_any_strides_and_without_a_gradient_the_same(relative_error):
    x = torch.randn(6, 5, 4, dtype=torch.float64).transpose(0, 2).requires_grad_()
    residual, weight = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(12, dtype=torch.float64)[::2]
    out, stream = add_rms_norm(x, residual, weight)
    assert out.is_contiguous() and stream.is_contiguous()
    (found,) = torch.autograd.grad(out.transpose(0, 1).sum(), x)
    (truth,) = torch.autograd.grad(formula(x + residual, weight, 1e-5).sum(), x)
    assert relative_error(out, formula(x + residual, weight, 1e-5)) < 1e-14
    assert relative_error(found, truth) < 1e-13
    with torch.no_grad():
        same = add_rms_norm(x, residual, weight)
    assert torch.equal(same[0], out) and torch.equal(same[1], stream)


def test_the_stream_is_not_the_input():
    """What begins the stream may be changed afterwards."""
    x = torch.randn(2, 4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert add_rms_norm(x, None, torch.ones(4))[1].data_ptr() != x.data_ptr()


def test_a_stream_in_fp64_stays_so():
    x, residual, weight = torch.randn(2, 4), torch.randn(2, 4).double(), torch.randn(4)
    out, stream = add_rms_norm(x, residual, weight)
    assert out.dtype == torch.float32 and torch.equal(stream, x + residual)


def test_autocast_changes_nothing():
    x, residual, weight = (leaf.detach().float() for leaf in draw(2, 4))
    given = [x.bfloat16(), residual, weight]
    plain = torch.ops.vlm.add_rms_norm(*given, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.ops.vlm.add_rms_norm(*given, 1e-5)
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_no_rows():
    x = torch.zeros(0, 4, requires_grad=True)
    out, stream = add_rms_norm(x, torch.zeros(0, 4), torch.ones(4))
    assert out.shape == stream.shape == (0, 4)
    assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_its_promises_to_the_dispatcher(dtype):
    x, residual, weight = (leaf.detach() for leaf in draw(2, 3, 8, dtype=torch.float32))
    x = x.to(dtype).requires_grad_()
    leaves = (x, residual.requires_grad_(), weight.requires_grad_())
    opcheck(torch.ops.vlm.add_rms_norm.default, (*leaves, 1e-5))
    opcheck(torch.ops.vlm.add_rms_norm.default, (x, None, leaves[2], 1e-5))
    stream, dout = torch.randn(2, 3, 8), torch.randn(2, 3, 8).to(dtype)
    for dstream, both in ((None, False), (stream + 1, True)):
        opcheck(
            torch.ops.vlm.add_rms_norm_backward.default,
            (dout, dstream, stream, weight.detach(), 1e-5, both),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_into_one_graph(relative_error):
    leaves = draw(2, 3, 8)

    def whole(x, residual, weight):
        out, stream = add_rms_norm(x, residual, weight)
        return (out.square() + stream).sum()

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*leaves), whole(*leaves)) < 1e-14
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for mine, true in zip(found, torch.autograd.grad(whole(*leaves), leaves), strict=True):
        assert relative_error(mine, true) < 1e-14
    with torch.no_grad():
        assert relative_error(compiled(*leaves), whole(*leaves)) < 1e-14


def test_a_second_derivative_is_refused():
    x, residual, weight = draw(2, 4)
    (gradient,) = torch.autograd.grad(add_rms_norm(x, residual, weight)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="add_rms_norm is differentiable once"):
        gradient.sum().backward()


def test_eps_counts():
    x = torch.full((1, 4), 1e-3)
    assert torch.allclose(rms_norm(x, torch.ones(4), eps=3e-6), torch.full((1, 4), 0.5))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"weight must be \(4,\)"):
        rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="residual must have x's shape"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(4))
