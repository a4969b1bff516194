"""The operators' gradients through the CUDA kernels on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch

from vlm.ops import selective_scan
from vlm.ops.backends import VARIABLE
from vlm.ops.cuda import scan_gradients

OUTPUT_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
GRADIENT_LIMITS = {torch.float32: 5e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def poisoned(gpu):
    """Fill what nobody wrote with NaN; the suite switches it off again."""
    torch.use_deterministic_algorithms(True)


def draw(dtype, length, channels=64, states=16, batch=2, segments=False, optional=True, rank=0):
    """The arguments of ``vlm::bi_scan`` up to the segments; sequences lie in wider rows, as in a block."""
    torch.manual_seed(length)
    u_f, u_b = (torch.randn(batch, length, channels).to(dtype) for _ in range(2))
    z = torch.randn(batch, length, 2 * channels).to(dtype)[..., channels:]
    width = rank or channels
    rows = [torch.randn(batch, length, width + 2 * states).to(dtype) for _ in range(2)]
    (delta_f, bc_f), (delta_b, bc_b) = (x.split([width, 2 * states], -1) for x in rows)
    weights = [(torch.randn(channels, rank) / rank**0.5).to(dtype) if rank else None for _ in range(2)]
    A_f, A_b = (-torch.rand(channels, states) - 0.1 for _ in range(2))
    D_f, D_b, bias_f, bias_b = (torch.randn(channels) for _ in range(4))
    biases = [bias_f, bias_b] if optional else [None, None]
    starts = (torch.rand(batch, length) < 0.1).cumsum(1, dtype=torch.int32) if segments else None
    return [u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, A_f, A_b, D_f, D_b, *biases, *weights, starts]


def one_way(arguments):
    """The same with the forward direction alone."""
    return [None if place in (1, 4, 6, 8, 10, 12, 14) else x for place, x in enumerate(arguments)]


def run(arguments, dout):
    """Output and all gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments[:-1]]
    out = torch.ops.vlm.bi_scan(*leaves, arguments[-1], True)[0]
    present = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, present, dout)]


def compare(monkeypatch, arguments):
    """Run by the kernels and in fp64, and hold every result to the contract."""
    u = arguments[0]
    dout = torch.randn(u.shape).to(u.dtype)
    monkeypatch.setenv(VARIABLE, "cuda")
    found = run(arguments, dout)
    monkeypatch.setenv(VARIABLE, "reference")
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    truth = run(wide, dout.double())
    for place, (mine, true) in enumerate(zip(found, truth, strict=True)):
        limit = GRADIENT_LIMITS[u.dtype] if place else OUTPUT_LIMITS[u.dtype]
        error, size = (mine.double() - true).norm(), true.norm()
        assert error <= limit * size, f"result {place}: {error:.1e} of {size:.1e}"
    for mine, given in zip(found[1:], (x for x in arguments[:-1] if x is not None), strict=True):
        assert mine.dtype == given.dtype and mine.shape == given.shape
    return found


def entries(gpu):
    return [wanted.entry for wanted in gpu.used]


@pytest.mark.parametrize("dtype", OUTPUT_LIMITS)
def test_both_directions(dtype, gpu, monkeypatch):
    for length in (1, 33, 75):
        compare(monkeypatch, draw(dtype, length))
    assert "vlm_scan_backward" in entries(gpu) and "vlm_scan_backward_carry" not in entries(gpu)
    assert {dict(wanted.defines)["VLM_ALIGNED"] for wanted in gpu.used if wanted.entry != "vlm_sum"} == {1}


def test_segments_and_missing_biases(monkeypatch):
    compare(monkeypatch, draw(torch.bfloat16, 75, segments=True))
    compare(monkeypatch, draw(torch.bfloat16, 40, optional=False))


def test_one_direction_and_channels_that_fill_no_vector(monkeypatch):
    compare(monkeypatch, one_way(draw(torch.bfloat16, 40)))
    compare(monkeypatch, draw(torch.float32, 35, channels=37, segments=True))


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 16), (torch.float16, 32), (torch.bfloat16, 48)])
def test_rank_rows_are_multiplied_in_the_kernel(dtype, rank, gpu, monkeypatch):
    for length in (1, 75):
        arguments = draw(dtype, length, rank=rank, segments=rank == 32)
        compare(monkeypatch, one_way(arguments) if rank == 48 else arguments)
    kinds = [dict(wanted.defines) for wanted in gpu.used if wanted.entry != "vlm_sum"]
    assert {kind["VLM_RANK"] for kind in kinds} == {rank}
    if rank > 16:
        return
    gpu.multiprocessors = 10**6
    compare(monkeypatch, draw(dtype, 75, rank=rank))
    assert entries(gpu).count("vlm_scan_backward_carry") == 1


@pytest.mark.parametrize(
    ("dtype", "rank", "channels"),
    [(torch.bfloat16, 3, 64), (torch.bfloat16, 16, 36), (torch.float32, 16, 64)],
)
def test_rank_rows_that_no_kernel_takes_are_multiplied_before(dtype, rank, channels, gpu, monkeypatch):
    """A rank that fills no fragment, channels that fill no vector, full precision."""
    arguments = draw(dtype, 40, channels, rank=rank)
    monkeypatch.setenv(VARIABLE, "cuda")
    dout = torch.randn(2, 40, channels).to(dtype)
    found = run(arguments, dout)
    assert {dict(wanted.defines)["VLM_RANK"] for wanted in gpu.used} == {0}
    monkeypatch.setenv(VARIABLE, "chunked")
    for mine, truth in zip(found, run(arguments, dout), strict=True):
        assert (mine.double() - truth.double()).norm() <= 5e-3 * truth.double().norm()


def tf32(x):
    """The nearest numbers that tf32 holds."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("rank", [16, 48])
def test_rank_rows_of_fp32_are_multiplied_in_tf32_where_pytorch_may(rank, gpu, tf32_allowed, monkeypatch):
    arguments = draw(torch.float32, 75, rank=rank, segments=rank == 16)
    monkeypatch.setenv(VARIABLE, "cuda")
    dout = torch.randn(2, 75, 64)
    found = run(arguments, dout)
    kinds = [dict(wanted.defines) for wanted in gpu.used if wanted.entry != "vlm_sum"]
    assert {kind["VLM_RANK"] for kind in kinds} == {rank}
    monkeypatch.setenv(VARIABLE, "reference")
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    rounded = [
        tf32(x).double() if place in (3, 4, 13, 14) else wide[place] for place, x in enumerate(arguments)
    ]
    errors = [
        [(mine.double() - true).norm() / true.norm() for mine, true in zip(found, truth, strict=True)]
        for truth in (run(rounded, dout.double()), run(wide, dout.double()))
    ]
    # only the product that gives delta is rounded, in both passes
    assert errors[0][0] < 1e-5 and 1e-5 < errors[1][0] < 1e-3
    assert max(errors[1][1:]) < 2e-3
    assert max(error for place, error in enumerate(errors[0][1:]) if place not in (3, 4, 13, 14)) < 5e-5


def test_rank_rows_at_odd_addresses_are_multiplied_before(gpu, monkeypatch):
    arguments = draw(torch.bfloat16, 40, rank=16)
    odd = torch.zeros(2, 40, 19).bfloat16()[..., 3:]
    arguments[4] = odd.copy_(arguments[4])
    even = [x.contiguous().clone() if place == 4 else x for place, x in enumerate(arguments)]
    monkeypatch.setenv(VARIABLE, "cuda")
    dout = torch.randn(2, 40, 64).bfloat16()
    found = run(arguments, dout)
    assert {dict(wanted.defines)["VLM_RANK"] for wanted in gpu.used} == {0}
    for mine, truth in zip(found, run(even, dout), strict=True):
        assert (mine.double() - truth.double()).norm() <= 1e-2 * truth.double().norm()
    assert 16 in {dict(wanted.defines)["VLM_RANK"] for wanted in gpu.used}


def test_one_direction_may_bring_delta_and_the_other_rows(gpu, monkeypatch):
    rows, whole = (draw(torch.bfloat16, 40, rank=rank) for rank in (16, 0))
    mixed = [whole[place] if place in (4, 14) else x for place, x in enumerate(rows)]
    compare(monkeypatch, mixed)
    assert {dict(wanted.defines)["VLM_RANK"] for wanted in gpu.used} == {0}


def test_few_warps_cut_time_into_spans(gpu, monkeypatch):
    arguments = draw(torch.bfloat16, 197, segments=True)
    whole = compare(monkeypatch, arguments)
    assert "vlm_scan_backward_carry" not in entries(gpu)
    gpu.multiprocessors = 10**6
    cut = compare(monkeypatch, arguments)
    assert entries(gpu).count("vlm_scan_backward_carry") == 1
    # the same problem, added up in another order
    assert any(not torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    gpu.multiprocessors = 2  # 8 warps are there and 16 wanted
    compare(monkeypatch, arguments)
    assert entries(gpu).count("vlm_scan_backward_carry") == 2


def test_spans_all_have_work(gpu):
    gpu.multiprocessors = 132
    for warps in (1, 7, 24, 500, 1056, 5000):
        for chunks in (1, 2, 7, 50, 393):
            spans = scan_gradients._num_spans(warps, chunks, torch.device("cpu"))
            each = -(-chunks // spans)
            assert (spans - 1) * each < chunks <= spans * each
            assert spans == 1 or warps * spans <= 8 * 132


@pytest.mark.parametrize("multiprocessors", [1, 10**6])
def test_results_repeat_to_the_bit(multiprocessors, gpu, monkeypatch):
    gpu.multiprocessors = multiprocessors
    monkeypatch.setenv(VARIABLE, "cuda")
    arguments = draw(torch.bfloat16, 75, segments=True)
    dout = torch.randn(arguments[0].shape).bfloat16()
    for one, other in zip(run(arguments, dout), run(arguments, dout), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_single_scan_with_all_options(dtype, reverse, gpu, both):
    """Groups, odd strides, a state to begin with, segments, a gate; the last state is asked for, too."""
    torch.manual_seed(1)
    sequences = [torch.randn(2, 71, 12).transpose(1, 2) for _ in range(3)]
    sequences += [torch.randn(2, 2, 16, 73)[..., 1:72] for _ in range(2)]
    floats = [-torch.rand(12, 16) - 0.1, torch.randn(12), torch.randn(12), torch.randn(2, 12, 16)]
    leaves = [x.to(dtype).detach().requires_grad_() for x in sequences]
    leaves += [x.requires_grad_() for x in floats]
    starts, dout = torch.rand(2, 71) < 0.1, torch.randn(2, 12, 71).to(dtype)

    def compute():
        u, delta, z, B, C, A, D, bias, initial = leaves
        options = {"initial_state": initial, "reverse": reverse, "segment_starts": starts}
        out, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True, **options)
        return [out.detach(), last, *torch.autograd.grad(out, leaves, dout)]

    found, expected = both(compute)
    # four warps for a multiprocessor that wants eight
    assert entries(gpu)[1:] == ["vlm_scan_backward", "vlm_scan_backward_carry", "vlm_sum"]
    for mine, truth in zip(found, expected, strict=True):
        # both sides round fp32 numbers, so half types show a last place at most
        limit = 5e-5 if mine.dtype == torch.float32 else 4e-3
        assert (mine.double() - truth.double()).norm() <= limit * truth.double().norm()


def test_the_single_scan_without_options(gpu, both):
    torch.manual_seed(2)
    leaves = [torch.randn(1, 8, 40), torch.rand(1, 8, 40), -torch.rand(8, 16), *torch.randn(2, 1, 16, 40)]
    leaves = [x.requires_grad_() for x in leaves]
    found, expected = both(lambda: torch.autograd.grad(selective_scan(*leaves).square().sum(), leaves))
    assert "vlm_scan_backward" in entries(gpu)
    for mine, truth in zip(found, expected, strict=True):
        assert (mine - truth).norm() <= 5e-5 * truth.norm()
