"""``vlm::add_rms_norm`` through the CUDA kernels, which an emulated GPU runs, against fp64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.library import opcheck

from vlm.ops import add_rms_norm, backends, rms_norm
from vlm.ops.cuda import norm_calls, trial

CPU = torch.device("cpu")
EPS = 1e-5
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "cuda")


def formula(stream, weight):
    return stream / torch.sqrt(stream.square().mean(-1, keepdim=True) + EPS) * weight


def draw(dtype, *shape):
    torch.manual_seed(0)
    leaves = [torch.randn(shape).to(dtype), torch.randn(shape), torch.randn(shape[-1])]
    return [leaf.requires_grad_() for leaf in leaves]


def run(x, residual, weight, weigh=None):
    """Return outputs and gradients, and the weights of the outputs in the sum."""
    outputs = add_rms_norm(x, residual, weight, EPS)
    weigh = weigh or [torch.randn_like(each) for each in outputs]
    leaves = [leaf for leaf in (x, residual, weight) if leaf is not None]
    gradients = torch.autograd.grad(outputs, leaves, weigh)
    return [*(each.detach() for each in outputs), *gradients], weigh


def assert_right(x, residual, weight, weigh=None):
    found, weigh = run(x, residual, weight, weigh)
    wide = [
        None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (x, residual, weight)
    ]
    stream = wide[0] if residual is None else wide[0] + wide[1]
    outputs = [formula(stream, wide[2]), stream * 1]
    leaves = [leaf for leaf in wide if leaf is not None]
    gradients = torch.autograd.grad(outputs, leaves, [each.double() for each in weigh])
    for place, (mine, true) in enumerate(zip(found, [*outputs, *gradients], strict=True)):
        error = float((mine.double() - true.detach()).norm() / true.detach().norm())
        assert mine.shape == true.shape and error <= LIMITS[mine.dtype], f"{place}: {error:.1e}"
    dtypes = [x.dtype, torch.float32, *(leaf.dtype for leaf in (x, residual, weight) if leaf is not None)]
    assert [each.dtype for each in found] == dtypes
    again, _ = run(x, residual, weight, weigh)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def forms(gpu):
    """Return pieces and alignment of the kernels that were used."""
    return {tuple(value for _, value in wanted.defines[1:]) for wanted in gpu.used}


@pytest.mark.parametrize("dtype", LIMITS)
def test_outputs_and_gradients(gpu, dtype):
    x, residual, weight = draw(dtype, 3, 7, 192)
    assert_right(x, residual, weight)
    assert_right(x, None, weight)
    assert {wanted.entry for wanted in gpu.used} == {"vlm_norm_forward", "vlm_norm_backward"}
    assert forms(gpu) == {(2, 1)}


def test_widths_and_rows_that_begin_anywhere(gpu):
    """One compilation serves several of each; a row too long for registers has its own."""
    for width, expected in ((130, (2, 0)), (1025, (0, 0)), (1032, (0, 1))):
        gpu.used.clear()
        assert_right(*draw(torch.bfloat16, 5, width))
        assert forms(gpu) == {expected}
    gpu.used.clear()
    x, residual, weight = draw(torch.bfloat16, 5, 137)
    assert_right(x.detach()[:, 1:131].requires_grad_(), residual.detach()[:, 7:].requires_grad_(), weight[7:])
    assert forms(gpu) == {(2, 0)}


def test_gradients_that_come_in_wider_rows(gpu):
    x, residual, weight = draw(torch.bfloat16, 2, 9, 192)
    weigh = [torch.randn(2, 9, 400).to(x.dtype)[..., 8:200], torch.randn(9, 2, 192).transpose(0, 1)]
    assert_right(x, residual, weight, weigh)
    assert forms(gpu) == {(2, 1)}


def test_one_row_that_is_not_whole_vectors(gpu):
    assert_right(*draw(torch.bfloat16, 1, 130))
    assert forms(gpu) == {(2, 0)}


def test_rows_of_any_strides_and_parameters_of_any_type(gpu):
    x, residual, weight = draw(torch.float32, 4, 6, 192)
    with torch.no_grad():
        columns, halved = x.transpose(0, 2).contiguous().transpose(0, 2), weight.bfloat16()
    assert_right(
        columns.requires_grad_(), residual.detach().bfloat16().requires_grad_(), halved.requires_grad_()
    )
    assert_right(x[:, ::2].detach().requires_grad_(), None, weight)


def test_only_one_output_may_be_used(gpu):
    x, residual, weight = draw(torch.float32, 9, 192)
    out, stream = add_rms_norm(x, residual, weight, EPS)
    found = torch.autograd.grad(stream.square().sum(), (x, residual), retain_graph=True)
    assert all(torch.allclose(each, 2 * (x + residual).detach()) for each in found)
    found = torch.autograd.grad(out.square().sum(), (x, residual, weight))
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, residual, weight)]
    total = formula(wide[0] + wide[1], wide[2]).square().sum()
    for mine, true in zip(found, torch.autograd.grad(total, wide), strict=True):
        assert (mine.double() - true).norm() <= 5e-5 * true.norm()
    assert torch.equal(rms_norm(x + residual, weight, EPS), out)


def test_a_larger_gpu_gets_smaller_blocks_and_the_same_numbers(gpu):
    x, residual, weight = draw(torch.float32, 600, 8)
    few, weigh = run(x, residual, weight)
    gpu.multiprocessors = 5
    some, _ = run(x, residual, weight, weigh)
    gpu.multiprocessors = 10**6
    many, _ = run(x, residual, weight, weigh)
    (backward,) = (kernel for wanted, kernel in gpu.kernels.items() if wanted.entry == "vlm_norm_backward")
    # no more than 64 rows, 40 blocks of four warps with four rows each, a row for each warp
    assert backward.launches == [-(-600 // 64), -(-600 // 16), -(-600 // 4)]
    for one, other, another in zip(few, some, many, strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm() and (one - another).norm() <= 1e-6 * one.norm()


def test_what_the_kernels_have_no_form_for_goes_to_pytorch(gpu):
    wide = [leaf.detach().double().requires_grad_() for leaf in draw(torch.float32, 3, 8)]
    assert add_rms_norm(*wide)[0].dtype == torch.float64
    assert add_rms_norm(wide[0].float(), *wide[1:])[1].dtype == torch.float64
    assert add_rms_norm(torch.zeros(0, 8, requires_grad=True), None, torch.ones(8))[0].shape == (0, 8)
    assert not gpu.used


def test_the_operator_keeps_its_promises_to_the_dispatcher(gpu):
    x, residual, weight = draw(torch.bfloat16, 2, 3, 8)
    opcheck(torch.ops.vlm.add_rms_norm.default, (x, residual, weight, EPS))
    stream, dout = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    for dstream, both in ((None, False), (stream + 1, True)):
        arguments = (dout, dstream, stream, weight.detach(), EPS, both)
        promises = ("test_schema", "test_faketensor")
        opcheck(torch.ops.vlm.add_rms_norm_backward.default, arguments, test_utils=promises)


@pytest.mark.requires_cuda
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_gpu_gives_the_same(dtype, monkeypatch):
    for choice in ("cuda", "auto"):
        monkeypatch.setenv(backends.VARIABLE, choice)
        assert backends.backend("add_rms_norm", "cuda", dtype) == "cuda"
        for width in (192, 576, 1000, 1032):
            x, residual, weight = (leaf.detach().cuda() for leaf in draw(dtype, 3, 197, width))
            assert_right(x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_())
            assert_right(x, None, weight)


@pytest.mark.requires_cuda
def test_a_graph_captures_it():
    given = [leaf.detach().cuda() for leaf in draw(torch.bfloat16, 9, 192)]
    expected = add_rms_norm(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = add_rms_norm(*given)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_trial_trusts_kernels_that_agree(gpu):
    for dtype in trial.LIMITS:
        assert trial.trusted("add_rms_norm", CPU, dtype)
    assert not trial.trusted("add_rms_norm", CPU, torch.float64)


@pytest.mark.parametrize("which", ["add_rms_norm_forward", "add_rms_norm_backward"])
def test_the_trial_refuses_kernels_that_do_not_agree(gpu, which, monkeypatch, caplog):
    original = getattr(norm_calls, which)

    def wrong(*arguments, **options):
        *others, last = original(*arguments, **options)
        return [*others, last * 1.01]

    monkeypatch.setattr(norm_calls, which, wrong)
    with caplog.at_level(logging.WARNING):
        assert not trial.trusted("add_rms_norm", CPU, torch.float32)
    assert "the CUDA add_rms_norm is off by" in caplog.text
