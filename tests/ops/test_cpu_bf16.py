"""bf16 in the C++ kernels: the fp32 kernels on the same values, rounded once at the end, to the bit."""

from __future__ import annotations

import pytest
import torch

from vlm.ops import cpu_library
from vlm.ops.backends import VARIABLE


@pytest.fixture(params=["portable", "v3", "v4"], autouse=True)
def instruction_set(request, monkeypatch):
    if not cpu_library.available(torch.bfloat16):
        pytest.skip(f"no C++ kernels: {cpu_library.unavailable_reason(torch.bfloat16)}")
    if cpu_library.LEVELS[request.param] > cpu_library.library().vlm_best_level():
        pytest.skip(f"this processor lacks {request.param}")
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, request.param)
    monkeypatch.setenv(VARIABLE, "cpu")


def draw(*shape):
    return torch.randn(*shape).bfloat16()


def widened(tensors):
    return [x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in tensors]


def rounded(x):
    return x.bfloat16() if x.dtype == torch.float32 else x


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize(("length", "channels", "states"), [(1, 5, 3), (70, 37, 8), (33, 64, 16)])
def test_the_scan(length, channels, states, two):
    torch.manual_seed(length)
    wide_rows = draw(2, length, 2 * channels)
    parameters = [-torch.rand(channels, states), torch.randn(channels), torch.randn(channels)]

    def pair(value, other):
        return [value, other if two else None]

    inputs = [
        *pair(draw(2, length, channels), draw(2, length, channels)),
        wide_rows[..., channels:],  # strided, as the block's gate is
        *pair(draw(2, length, channels), draw(2, length, channels)),
        *pair(draw(2, length, 2 * states + 3)[..., 3:], draw(2, length, 2 * states + 3)[..., 3:]),
        *(x for p in parameters for x in pair(p, p.flip(0))),
        *(None,) * 3,
    ]
    out, total, kept = torch.ops.vlm.bi_scan(*inputs, True)
    whole, whole_total, whole_kept = torch.ops.vlm.bi_scan(*widened(inputs), True)
    assert out.dtype == total.dtype == torch.bfloat16 and kept.dtype == torch.float32
    assert torch.equal(out, rounded(whole)) and torch.equal(total, rounded(whole_total))
    assert torch.equal(kept, whole_kept)
    dout = draw(2, length, channels)
    found = torch.ops.vlm.bi_scan_backward(dout, *inputs, total, kept)
    expected = torch.ops.vlm.bi_scan_backward(dout.float(), *widened(inputs), total.float(), kept)
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, rounded(theirs) if place < 7 else theirs), place


@pytest.mark.parametrize("two", [True, False])
def test_the_convolution(two):
    torch.manual_seed(0)
    x = draw(2, 70, 2 * 21)[..., :21]
    weights = [torch.randn(21, 4), torch.randn(21)]
    inputs = [x, *weights, *([w.flip(0) for w in weights] if two else (None, None)), None]
    out = torch.ops.vlm.conv2(*inputs)
    whole = torch.ops.vlm.conv2(*widened(inputs))
    assert all(torch.equal(a, rounded(b)) for a, b in zip(out, whole, strict=True))
    du = [draw(2, 70, 21), draw(2, 70, 21) if two else None]
    found = torch.ops.vlm.conv2_backward(*du, *inputs)
    expected = torch.ops.vlm.conv2_backward(*widened(du), *widened(inputs))
    assert torch.equal(found[0], rounded(expected[0]))
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


def test_rounding_is_to_nearest_even_and_keeps_what_is_not_finite():
    """The identity convolution without SiLU's help: large values pass it unchanged."""
    values = torch.tensor([float("nan"), float("inf"), 3.0e38, 88.5, 257.0, 1e-40, -0.0, 0.0]).bfloat16()
    x = values.repeat(3)[None, None]
    weight = torch.zeros(24, 4)
    weight[:, 3] = 1.0
    out, _ = torch.ops.vlm.conv2(x, weight, None, None, None, None)
    expected, _ = torch.ops.vlm.conv2(x.float(), weight, None, None, None, None)
    assert torch.equal(out.isnan(), expected.isnan()) and out[0, 0, 0].isnan()
    finite = ~out.isnan()
    assert torch.equal(out[finite], expected.bfloat16()[finite])
