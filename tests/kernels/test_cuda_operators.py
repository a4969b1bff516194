"""The operators through the CUDA kernels, which an emulated GPU runs on the CPU's memory."""

from __future__ import annotations

import logging

import pytest
import torch

from vlm.models.mamba_block import BidirectionalMixer, initialise_mixer
from vlm.ops import Branch, bidirectional_mamba, selective_scan
from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import scan_calls, scan_gradients
from vlm.ops.cuda import trial as cuda_trial

CPU = torch.device("cpu")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def mixer(dtype, channels=64, length=43, batch=2, rank=3):
    torch.manual_seed(0)
    shapes = [
        (channels, 4),
        (channels,),
        (rank + 32, channels),
        (channels, rank),
        (channels,),
        (channels, 16),
    ]
    leaves = [torch.randn(batch, length, 2 * channels).to(dtype)]
    for _ in range(2):
        leaves += [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
        leaves[-1] = torch.arange(1, 17).log().repeat(channels, 1)
        leaves.append(torch.randn(channels))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return leaves, lambda: bidirectional_mamba(leaves[0], Branch(*leaves[1:8]), Branch(*leaves[8:]))


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_mixer_and_its_gradients(gpu, both, dtype):
    leaves, forward = mixer(dtype)

    def compute():
        out = forward()
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    found, expected = both(compute)
    assert {wanted.entry for wanted in gpu.used} == {
        "vlm_conv_forward",
        "vlm_scan_forward",
        "vlm_scan_backward",
        "vlm_sum",
        "vlm_conv_backward",
    }
    scans = [dict(wanted.defines) for wanted in gpu.used if wanted.entry.startswith("vlm_scan")]
    # three columns are filled up to sixteen, which half types multiply in the kernel
    assert {kind["VLM_RANK"] for kind in scans} == {0 if dtype == torch.float32 else 16}
    assert {kind["VLM_ALIGNED"] for kind in scans} == {1}
    assert error(found[0], expected[0]) < LIMITS[dtype]
    for mine, truth in zip(found[1:], expected[1:], strict=True):
        assert error(mine, truth) < 20 * LIMITS[dtype]


def test_filling_up_changes_no_number(gpu, both, monkeypatch):
    """Against what runs elsewhere: rows as they are, delta from a product of its own."""
    leaves, forward = mixer(torch.bfloat16, rank=20)

    def compute():
        out = forward()
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    found = both(compute)[0]
    scans = [dict(wanted.defines) for wanted in gpu.used if wanted.entry.startswith("vlm_scan")]
    assert {kind["VLM_RANK"] for kind in scans} == {32}
    monkeypatch.setattr(cuda_arguments, "on_gpu", lambda _tensor: False)
    for mine, truth in zip(found, both(compute)[1], strict=True):
        assert error(mine, truth) < 2e-2  # delta is rounded there and not here


def test_projections_that_are_modules(gpu, both, monkeypatch):
    """A plain layer is filled up; one that somebody watches, adapts or gives a bias is called as it is."""
    torch.manual_seed(3)
    x_proj, dt_proj = torch.nn.Linear(64, 35, bias=False), torch.nn.Linear(3, 64)
    xz, conv, rates, skip = torch.randn(1, 9, 128), torch.randn(64, 4), torch.zeros(64, 16), torch.ones(64)

    def compute():
        branch = Branch(conv, None, x_proj, dt_proj, None, rates, skip)
        return bidirectional_mamba(xz.bfloat16(), branch, None).detach()

    x_proj.bfloat16()
    dt_proj.bfloat16()
    plain, expected = both(compute)
    assert error(plain, expected) < LIMITS[torch.bfloat16]
    called = []
    x_proj.register_forward_hook(lambda *_: called.append(1))
    watched = both(compute)[0]
    assert called and error(watched, expected) < LIMITS[torch.bfloat16]
    monkeypatch.setattr(x_proj, "bias", torch.nn.Parameter(torch.ones(35).bfloat16()))
    biased, expected = both(compute)
    assert error(biased, expected) < LIMITS[torch.bfloat16] and error(biased, plain) > 1e-2


def test_a_models_mixer_trains_in_half_precision(gpu, both):
    """Weights in full precision, products under autocast: the model's own layers reach the short way."""
    torch.manual_seed(4)
    sizes = {"state_size": 16, "conv_width": 4, "expand": 2, "dt_rank": 12, "bidirectional": True}
    layer = BidirectionalMixer(32, **sizes)
    initialise_mixer(layer, depth=1, style="mamba")
    tokens = torch.randn(2, 40, 32)

    def compute():
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(tokens)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))]

    found, expected = both(compute)
    scans = [dict(wanted.defines) for wanted in gpu.used if wanted.entry.startswith("vlm_scan")]
    assert {(kind["VLM_IO"], kind["VLM_RANK"], kind["VLM_ALIGNED"]) for kind in scans} == {("bf16", 16, 1)}
    for mine, truth, given in zip(found[1:], expected[1:], layer.parameters(), strict=True):
        assert mine.dtype == given.dtype == torch.float32
        assert error(mine, truth) < 2e-2  # delta is rounded there and not here
    assert error(found[0], expected[0]) < 1e-2


def test_without_gradients_nothing_is_kept(gpu, both):
    _, forward = mixer(torch.bfloat16)
    with torch.no_grad():
        found, expected = both(forward)
    assert error(found, expected) < LIMITS[torch.bfloat16]
    assert {dict(wanted.defines).get("VLM_EVENTS", 0) for wanted in gpu.used} == {0}


def test_few_warps_share_the_time(gpu, both):
    _, forward = mixer(torch.float32, length=140)
    with torch.no_grad():
        one, expected = both(forward)
        gpu.multiprocessors = 10**6
        gpu.used.clear()
        many, _ = both(forward)
    assert (
        max(dict(wanted.defines).get("VLM_SPLIT", 0) for wanted in gpu.used) == 4
    )  # 140 steps are 4 tiles of 32
    assert error(one, expected) < 1e-5 and error(many, expected) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_the_single_scan_with_all_options(gpu, both, reverse):
    """Groups, odd strides, a state to begin with, segments, the last state."""
    torch.manual_seed(1)
    u, delta, z = (torch.randn(2, 21, 12)[..., :].transpose(1, 2) for _ in range(3))
    B, C = (torch.randn(2, 2, 16, 43)[..., 1:22] for _ in range(2))
    A, D, bias, initial = -torch.rand(12, 16) - 0.1, torch.randn(12), torch.randn(12), torch.randn(2, 12, 16)
    starts = torch.rand(2, 21) < 0.2

    def compute():
        options = {"initial_state": initial, "reverse": reverse, "segment_starts": starts}
        return selective_scan(u, delta, A, B, C, D, z, bias, True, True, **options)

    (out, last), (expected, expected_last) = both(compute)
    assert gpu.used and dict(gpu.used[-1].defines)["VLM_ALIGNED"] == 0  # six channels to a group
    assert error(out, expected) < 1e-5 and error(last, expected_last) < 1e-5


def test_what_the_kernels_have_no_form_for_goes_to_pytorch(gpu, both):
    torch.manual_seed(2)
    u = torch.randn(1, 4, 9)
    A, B = -torch.rand(4, 5), torch.randn(1, 5, 9)  # no kernel has five states
    found, expected = both(lambda: selective_scan(u, u, A, B, B))
    assert not gpu.used and torch.equal(found, expected)


def test_the_trial_trusts_kernels_that_agree(gpu):
    for dtype in cuda_trial.LIMITS:
        assert cuda_trial.trusted("bi_scan", CPU, dtype)
    assert not cuda_trial.trusted("bi_scan", CPU, torch.float64)


def test_the_trial_of_tf32_is_one_of_its_own(gpu, request):
    assert cuda_trial.trusted("bi_scan", CPU, torch.float32)
    assert {dict(wanted.defines)["VLM_RANK"] for wanted in gpu.used if wanted.entry != "vlm_sum"} == {0}
    request.getfixturevalue("tf32_allowed")
    assert cuda_trial.trusted("bi_scan", CPU, torch.float32)
    assert {dict(wanted.defines)["VLM_RANK"] for wanted in gpu.used if wanted.entry != "vlm_sum"} == {0, 16}


def test_the_trial_refuses_kernels_that_do_not_agree(gpu, monkeypatch, caplog):
    original = scan_calls.bi_scan_forward

    def wrong(scans, *others, save):
        return original([scans[0]._replace(D=scans[0].D * 1.01), scans[1]], *others, save=save)

    monkeypatch.setattr(scan_calls, "bi_scan_forward", wrong)
    with caplog.at_level(logging.WARNING):
        assert not cuda_trial.trusted("bi_scan", CPU, torch.float32)
    assert "the CUDA bi_scan is off by" in caplog.text


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, True), (1.01, False), (float("nan"), False)])
def test_the_trial_refuses_wrong_gradients(factor, verdict, gpu, monkeypatch):
    original = scan_gradients.bi_scan_backward

    def scaled(*arguments):
        gradients, joined, dz = original(*arguments)
        return [gradients[0], gradients[1]._replace(A=gradients[1].A * factor)], joined, dz

    monkeypatch.setattr(scan_gradients, "bi_scan_backward", scaled)
    assert cuda_trial.trusted("bi_scan", CPU, torch.float32) == verdict
