"""The operators through the CUDA kernels, which an emulated GPU runs on the CPU's memory."""

from __future__ import annotations

import logging

import pytest
import torch

from vlm.ops import Branch, bidirectional_mamba, selective_scan
from vlm.ops.cuda import scan_calls
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
    assert {wanted.entry for wanted in gpu.used} >= {
        "vlm_conv_forward",
        "vlm_scan_forward",
        "vlm_conv_backward",
    }
    assert error(found[0], expected[0]) < LIMITS[dtype]
    for mine, truth in zip(found[1:], expected[1:], strict=True):
        assert error(mine, truth) < 20 * LIMITS[dtype]


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
        assert cuda_trial.trusted(CPU, dtype)
    assert not cuda_trial.trusted(CPU, torch.float64)


def test_the_trial_refuses_kernels_that_do_not_agree(gpu, monkeypatch, caplog):
    original = scan_calls.bi_scan_forward

    def wrong(scans, z, *, save):
        return original([scans[0]._replace(D=scans[0].D * 1.01), scans[1]], z, save=save)

    monkeypatch.setattr(scan_calls, "bi_scan_forward", wrong)
    with caplog.at_level(logging.WARNING):
        assert not cuda_trial.trusted(CPU, torch.float32)
    assert "the CUDA scan is off by" in caplog.text
