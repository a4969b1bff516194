"""The published way through a block, with PyTorch in the place of its extensions, is the block."""

from __future__ import annotations

import time

import pytest
import torch

from vlm.models.mamba_block import BidirectionalMixer, initialise_mixer
from vlm.ops import selective_scan


def test_the_published_way_gives_the_mixers_numbers(benchmark, extensions):
    official = benchmark("official")
    torch.manual_seed(0)
    mixer = BidirectionalMixer(8, state_size=4, conv_width=4, expand=2, dt_rank=3, bidirectional=True)
    initialise_mixer(mixer, 1, "mamba")
    tokens = torch.randn(2, 7, 8, requires_grad=True)
    leaves, dout = [tokens, *mixer.parameters()], torch.randn(2, 7, 8)
    ours = mixer(tokens)
    expected = torch.autograd.grad(ours, leaves, dout)
    with official.serving():
        theirs = mixer(tokens)
    assert extensions.calls == 2
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    for mine, other in zip(expected, torch.autograd.grad(theirs, leaves, dout), strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)
    assert torch.equal(mixer(tokens), ours)  # and afterwards it is ours again


def test_two_scans_and_flips_are_the_two_directions(benchmark, extensions):
    official = benchmark("official")
    torch.manual_seed(1)
    z = torch.randn(2, 6, 9)
    A, bias, D = -torch.rand(6, 4), torch.randn(6), torch.randn(6)
    sides = [
        [torch.randn(2, 6, 9), torch.randn(2, 6, 9), A, *torch.randn(2, 2, 1, 4, 9), D, z, bias]
        for _ in range(2)
    ]
    flipped = [x.flip(-1) if place in (0, 1, 3, 4) else x for place, x in enumerate(sides[1])]
    expected = sum(
        selective_scan(*side, True, reverse=reverse)
        for side, reverse in zip(sides, (False, True), strict=True)
    )
    torch.testing.assert_close(official.scans(sides[0], flipped), expected, rtol=1e-5, atol=1e-5)


def test_what_is_built_and_what_is_a_stub(benchmark, tmp_path):
    build_official = benchmark("build_official")
    text = "\n".join(
        f"template void causal_conv1d_fwd_cuda<{kind}, {weight}>(P &params, cudaStream_t stream);"
        for kind in ("float", "at::BFloat16")
        for weight in ("float", "at::Half")
    )
    path = tmp_path / "a.cu"
    path.write_text("code\n" + text)
    build_official._keep(path, {("causal_conv1d_fwd_cuda", "at::BFloat16", "float")})
    assert path.read_text().split() == ["code", *text.split("\n")[2].split()]
    stubs = build_official._stubs("a.h", {"f": "P &"}, [("f", "float", "c10::complex<float>")])
    assert "template <> void f<float, c10::complex<float>>(P &, cudaStream_t) {" in stubs


def test_a_machine_without_sources_or_compiler_says_so(benchmark, tmp_path):
    build_official = benchmark("build_official")
    assert "no nvcc" in build_official.build(tmp_path, tmp_path / "built", nvcc=str(tmp_path / "nvcc"))
    (tmp_path / "nvcc").touch()
    reason = build_official.build(tmp_path, tmp_path / "built", nvcc=str(tmp_path / "nvcc"))
    assert "no sources of mamba_ssm, causal_conv1d" in reason


def test_a_compiler_that_fails_or_hangs_is_reported(benchmark, tmp_path):
    build_official = benchmark("build_official")
    with pytest.raises(RuntimeError, match="wrong"):
        build_official._run([["sh", "-c", "echo wrong; exit 1"]], time.monotonic() + 60)
    with pytest.raises(RuntimeError, match="time is up"):
        build_official._run([["sleep", "10"]], 0.0)
