"""Both directions of the convolution against PyTorch's own, and against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vlm.ops import conv2


def formula(x, weight, bias):
    """Depthwise causal convolution with SiLU by ``conv1d``."""
    taps = weight.shape[1]
    c = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight.unsqueeze(1), bias, groups=x.shape[2])
    return F.silu(c).transpose(1, 2)


def mirrored(x, weight, bias):
    return formula(x.flip(1), weight, bias).flip(1)


def draw(length, dim, taps=4):
    kw = {"dtype": torch.float64}
    values = [torch.randn(2, length, 2 * dim, **kw)]
    for _ in range(2):
        values += [torch.randn(dim, taps, **kw), torch.randn(dim, **kw)]
    return [v.requires_grad_() for v in values]


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("length", "dim"), [(1, 3), (2, 40), (5, 16), (63, 7), (64, 5), (65, 33), (197, 9)])
def test_equals_conv1d_in_both_directions(length, dim, taps, every_kernel, relative_error):
    leaves = draw(length, dim, taps)
    x = leaves[0][..., :dim]
    douts = torch.randn(2, 2, length, dim, dtype=torch.float64)
    expected = [formula(x, *leaves[1:3]), mirrored(x, *leaves[3:])]
    truth = torch.autograd.grad(expected, leaves, list(douts))
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        values = [v.detach().to(dtype).requires_grad_() for v in leaves]
        outputs = conv2(values[0][..., :dim], *values[1:])
        gradients = torch.autograd.grad(outputs, values, list(douts.to(dtype)))
        for a, b in zip([*outputs, *gradients], [*expected, *truth], strict=True):
            assert relative_error(a, b) < limit


def test_one_direction_and_no_bias(every_kernel, relative_error):
    x, weight, *_ = draw(20, 3)
    x = x[..., :3].detach().requires_grad_()
    u, none = conv2(x, weight)
    assert none is None
    expected = formula(x, weight, None)
    assert relative_error(u, expected) < 1e-13
    dout = torch.randn_like(u)
    for a, b in zip(
        torch.autograd.grad(u, (x, weight), dout),
        torch.autograd.grad(expected, (x, weight), dout),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-13


def test_only_one_output_may_be_used(every_kernel, relative_error):
    leaves = draw(20, 3)
    x = leaves[0][..., :3]
    (gradient,) = torch.autograd.grad(conv2(x, *leaves[1:])[1].sum(), leaves[0])
    (expected,) = torch.autograd.grad(mirrored(x, *leaves[3:]).sum(), leaves[0])
    assert relative_error(gradient, expected) < 1e-13


def test_segments_do_not_see_each_other(every_kernel, relative_error):
    leaves = draw(130, 5)
    x = leaves[0][..., :5]
    cuts = [0, 1, 3, 64, 66, 130]
    starts = torch.zeros(130, dtype=torch.bool)
    starts[cuts[:-1]] = True
    douts = list(torch.randn(2, 2, 130, 5, dtype=torch.float64))
    pieces = [x[:, a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    expected = [
        torch.cat([formula(p, *leaves[1:3]) for p in pieces], 1),
        torch.cat([mirrored(p, *leaves[3:]) for p in pieces], 1),
    ]
    outputs = conv2(x, *leaves[1:], segment_starts=starts)
    truth = torch.autograd.grad(expected, leaves, douts)
    gradients = torch.autograd.grad(outputs, leaves, douts)
    for a, b in zip([*outputs, *gradients], [*expected, *truth], strict=True):
        assert relative_error(a, b) < 1e-13


def test_the_operator_keeps_its_promises_to_the_dispatcher(scan_backend):
    x, *parameters = draw(9, 3)
    x = x.detach()[..., :3].requires_grad_()
    segments = torch.arange(9, dtype=torch.int32).div(4, rounding_mode="floor").expand(2, 9).contiguous()
    opcheck(torch.ops.vlm.conv2.default, (x, *parameters, segments))
    opcheck(torch.ops.vlm.conv2.default, (x, parameters[0], None, None, None, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3, 4)), "x must be"),
        ((torch.zeros(2, 0, 3), torch.zeros(3, 4)), "x must be"),
        ((torch.zeros(2, 5, 3), torch.zeros(4, 4)), "weight_f must be"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 2, 4)), "weight_f must be"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 4), None, torch.zeros(3, 3)), "weight_b must be"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 4), torch.zeros(4)), "bias_f must be"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 4), None, None, torch.zeros(3)), "bias_b needs weight_b"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2(*arguments)
