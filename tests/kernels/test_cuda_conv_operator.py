"""``vlm::conv2`` through the CUDA kernels, which an emulated GPU runs on the CPU's memory, against fp64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.library import opcheck

from vlm.ops import backends, conv2
from vlm.ops.causal_conv import reference
from vlm.ops.cuda import conv_calls, trial

CPU = torch.device("cpu")
FORWARD_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}
GRADIENT_LIMITS = {torch.float32: 5e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "cuda")


def draw(dtype, *, dim=24, length=37, taps=4, directions=2, bias=True, start=0):
    """Return xz of which x is the first half from ``start`` on, the parameters, and where segments begin."""
    torch.manual_seed(taps + directions)
    leaves = [torch.randn(2, length, 2 * dim + start).to(dtype)]
    for direction in range(2):
        has = direction < directions
        leaves.append(torch.randn(dim, 1, taps) if has else None)
        leaves.append(torch.randn(dim) if has and bias else None)
    starts = torch.rand(2, length) < 0.2
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves], starts


def run(leaves, starts, start=0, weigh=None):
    """Return outputs and gradients of the leaves, and the weights of the outputs in the sum."""
    dim = leaves[1].shape[0]
    x = leaves[0][..., start : start + dim]
    outputs = [u for u in conv2(x, *leaves[1:], segment_starts=starts) if u is not None]
    weigh = weigh or [torch.randn_like(u) for u in outputs]
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(outputs, given, weigh)
    return [*(u.detach() for u in outputs), *gradients], weigh


def truth(leaves, starts, weigh, start=0):
    """Return the same by autograd of the formula in fp64."""
    wide = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    dim = leaves[1].shape[0]
    segments = None if starts is None else starts.cumsum(1)
    outputs = [
        reference.forward(
            wide[0][..., start : start + dim],
            wide[1 + 2 * place].squeeze(1),
            wide[2 + 2 * place],
            segments,
            anticausal=place == 1,
        )
        for place in range(len(weigh))
    ]
    given = [leaf for leaf in wide if leaf is not None]
    gradients = torch.autograd.grad(outputs, given, [each.double() for each in weigh])
    return [*(u.detach() for u in outputs), *gradients]


def assert_right(leaves, starts, start=0, weigh=None):
    found, weigh = run(leaves, starts, start, weigh)
    expected = truth(leaves, starts, weigh, start)
    for place, (mine, true) in enumerate(zip(found, expected, strict=True)):
        # gradients of parameters are fp32 whatever the sequences are
        limits = FORWARD_LIMITS if place < len(weigh) else GRADIENT_LIMITS
        error = float((mine.double() - true).norm() / true.norm())
        assert mine.shape == true.shape and error <= limits[mine.dtype], f"{place}: {error:.1e}"
    again, _ = run(leaves, starts, start, weigh)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def macros(gpu):
    """Return what the kernels that were used are compiled for."""
    return {(w.entry, *(value for _, value in w.defines)) for w in gpu.used}


@pytest.mark.parametrize("dtype", FORWARD_LIMITS)
def test_both_directions_read_half_of_xz(gpu, dtype):
    leaves, _ = draw(dtype)
    assert_right(leaves, None)
    assert {used[3:] for used in macros(gpu)} == {(2, 1, 0)}  # two directions, aligned, no segments


def test_gradients_that_come_in_wider_rows(gpu):
    leaves, _ = draw(torch.float32)
    joined = torch.randn(2, 37, 56)
    assert_right(leaves, None, weigh=[joined[..., :24], joined[..., 32:]])
    assert {used[3:] for used in macros(gpu)} == {(2, 1, 0)}


def test_one_step_whose_rows_are_not_whole_vectors(gpu):
    x, weight, bias = torch.randn(1, 1, 21), torch.randn(21, 4), torch.randn(21)
    u = conv2(x, weight, bias)[0]
    expected = reference.forward(x.double(), weight.double(), bias.double(), None, anticausal=False)
    assert (u - expected).norm() <= 1e-5 * expected.norm()
    assert {used[3:] for used in macros(gpu)} == {(1, 0, 0)}


@pytest.mark.parametrize(
    ("dtype", "taps", "directions", "start", "dim"),
    [
        (torch.float32, 2, 1, 1, 24),
        (torch.bfloat16, 3, 2, 0, 21),
        (torch.float16, 4, 1, 0, 24),
    ],
)
def test_segments_taps_directions_and_rows_that_begin_anywhere(gpu, dtype, taps, directions, start, dim):
    leaves, starts = draw(dtype, dim=dim, taps=taps, directions=directions, start=start)
    assert_right(leaves, starts, start)
    is_aligned = int(start == 0 and dim % 8 == 0)
    assert {used[2:] for used in macros(gpu)} == {(taps, directions, is_aligned, 1)}


def test_without_bias_and_with_one_output_unused(gpu):
    leaves, _ = draw(torch.float32, bias=False)
    x, weight_f, _, weight_b, _ = leaves
    for used in (0, 1):
        u = conv2(x[..., :24], weight_f, None, weight_b)[used]
        found = torch.autograd.grad(u.square().sum(), (x, weight_f, weight_b))
        zero = [torch.zeros_like(u), torch.zeros_like(u)]
        zero[used] = 2 * u.detach()
        expected = truth(leaves, None, zero)[2:]
        for mine, true in zip(found, expected, strict=True):
            assert (mine.double() - true).norm() <= 5e-5 * true.norm()


def test_parameters_keep_their_dtype(gpu):
    leaves, _ = draw(torch.bfloat16)
    halves = [leaf.detach().to(torch.bfloat16).requires_grad_() for leaf in leaves]
    found, _ = run(halves, None)
    assert [each.dtype for each in found] == [torch.bfloat16] * 7


def test_sequences_of_any_strides(gpu):
    """Channels that do not lie side by side, one batch for all, gradients without memory of their own."""
    leaves, _ = draw(torch.float32)
    x = torch.randn(24, 37).t().expand(2, 37, 24).requires_grad_()
    u = conv2(x, *leaves[1:])[0]
    (found,) = torch.autograd.grad(u.sum(), x)
    wide = x.detach().double().requires_grad_()
    weight, bias = leaves[1].double().squeeze(1), leaves[2].double()
    (expected,) = torch.autograd.grad(
        reference.forward(wide, weight, bias, None, anticausal=False).sum(), wide
    )
    assert (found.double() - expected).norm() <= 5e-5 * expected.norm()


def test_a_larger_gpu_gets_shorter_stretches_and_the_same_numbers(gpu):
    leaves, _ = draw(torch.float32, length=90)
    few, weigh = run(leaves, None)
    gpu.multiprocessors = 10**6
    many, _ = run(leaves, None, weigh=weigh)
    forward, *_ = (kernel for wanted, kernel in gpu.kernels.items() if wanted.entry == "vlm_conv_forward")
    # two batches of 9 stretches of 10 steps, which 24 walkers can share, or of 45 stretches of 2 steps
    assert forward.launches == [-(-2 * 9 // 8), -(-2 * 45 // 8)]
    assert torch.equal(few[0], many[0]) and torch.equal(few[1], many[1])
    for one, other in zip(few, many, strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize(
    ("length", "overlap", "columns", "at_once"),
    [
        (1, 6, 1, 1),
        (3, 6, 4, 3168),
        (1569, 6, 24, 3168),
        (1569, 6, 192, 3168),
        (100_000, 3, 1, 8),
        (90, 2, 1, 1),
    ],
)
def test_a_stretch_is_whole_tiles_and_cheapest(length, overlap, columns, at_once):
    chosen = conv_calls._stretch(length, overlap, columns, at_once)
    assert chosen == length or (chosen + overlap) % 8 == 0 and 0 < chosen < length

    def seconds(stretch):
        """Rounds of walkers, each as long as its tiles and one more to get going."""
        walkers = columns * -(-length // stretch)
        return -(-walkers // at_once) * (-(-(stretch + overlap) // 8) + 1)

    others = range(1, min(length, 64 * 8 - overlap) + 1)
    assert seconds(chosen) == min(map(seconds, others))


def test_what_the_kernels_have_no_form_for_goes_to_pytorch(gpu):
    for taps, dtype in ((1, torch.float32), (5, torch.bfloat16), (4, torch.float64)):
        leaves, _ = draw(dtype, taps=taps)
        found, weigh = run(leaves, None)
        for mine, true in zip(found, truth(leaves, None, weigh), strict=True):
            assert (mine.double() - true).norm() <= 5e-3 * true.norm()
    assert not gpu.used


def test_the_operator_keeps_its_promises_to_the_dispatcher(gpu):
    leaves, starts = draw(torch.float32, length=9)
    x, weight_f, bias_f, weight_b, bias_b = (leaf.detach() for leaf in leaves)
    given = [x[..., :24], weight_f.squeeze(1), bias_f, weight_b.squeeze(1), bias_b]
    segments, u = starts.cumsum(1, dtype=torch.int32), torch.randn(2, 9, 24)
    leaves = [each.requires_grad_() for each in given]
    opcheck(torch.ops.vlm.conv2.default, (*leaves, segments))
    opcheck(torch.ops.vlm.conv2.default, (*leaves[:3], None, None, None))
    arguments = (u, u + 1, *(leaf.detach() for leaf in leaves), segments)
    promises = ("test_schema", "test_faketensor")
    opcheck(torch.ops.vlm.conv2_backward.default, arguments, test_utils=promises)


@pytest.mark.requires_cuda
@pytest.mark.parametrize("dtype", FORWARD_LIMITS)
def test_a_gpu_gives_the_same(dtype, monkeypatch):
    for choice in ("cuda", "auto"):
        monkeypatch.setenv(backends.VARIABLE, choice)
        assert backends.backend("conv2", "cuda", dtype) == "cuda"
        for dim, length in ((384, 197), (70, 33)):
            leaves, starts = draw(dtype, dim=dim, length=length)
            leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
            assert_right(leaves, None)
            assert_right(leaves, starts.cuda())


@pytest.mark.requires_cuda
def test_a_graph_captures_it():
    leaves = [leaf.detach().cuda() for leaf in draw(torch.bfloat16, dim=64)[0]]
    expected = conv2(leaves[0][..., :64], *leaves[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = conv2(leaves[0][..., :64], *leaves[1:])
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_trial_trusts_kernels_that_agree(gpu):
    for dtype in trial.LIMITS:
        assert trial.trusted("conv2", CPU, dtype)
    assert not trial.trusted("conv2", CPU, torch.float64)


@pytest.mark.parametrize("which", ["conv2_forward", "conv2_backward"])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_the_trial_refuses_kernels_that_do_not_agree(gpu, which, factor, monkeypatch, caplog):
    original = getattr(conv_calls, which)

    def wrong(*arguments):
        first, *others = original(*arguments)
        return [first * factor, *others]

    monkeypatch.setattr(conv_calls, which, wrong)
    with caplog.at_level(logging.WARNING):
        assert not trial.trusted("conv2", CPU, torch.float32)
        assert not trial.trusted("conv2", CPU, torch.float32)
    assert caplog.text.count("the CUDA conv2 is off by") == 1


@pytest.mark.parametrize("op", ["bi_scan", "conv2"])
def test_nothing_is_tried_while_a_stream_is_captured(op, gpu, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(trial, "_agrees", lambda *_: pytest.fail("a trial"))
    assert not trial.trusted(op, device, torch.float32)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "_agrees", lambda *_: True)
    assert trial.trusted(op, device, torch.float32)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert trial.trusted(op, device, torch.float32)
