"""The truth chain: a formula under autograd in fp64, then every implementation, output and gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vlm.ops import selective_scan

LENGTHS = (1, 2, 15, 16, 17, 31, 63, 197)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def formula(u, delta, A, B, C, D, z, delta_bias, initial_state, starts=None, reverse=False, softplus=True):
    """The definition, step by step, in the mamba-ssm layout; autograd does the rest."""
    batch, dim, length = u.shape
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    share = dim // B.shape[1]
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    h = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
    out = [None] * length
    times = list(range(length))[:: -1 if reverse else 1]
    for before, t in zip([None, *times], times, strict=False):
        if starts is not None and before is not None:
            border = starts.expand(batch, length)[:, max(before, t)]
            h = torch.where(border[:, None, None], torch.zeros_like(h), h)
        Bt = B[..., t].repeat_interleave(share, 1)
        Ct = C[..., t].repeat_interleave(share, 1)
        h = torch.exp(dt[..., t, None] * A) * h + (dt[..., t] * u[..., t])[..., None] * Bt
        out[t] = (h * Ct).sum(-1)
    y = torch.stack(out, -1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def draw(length, dim=5, groups=None, states=16, batch=2, dtype=torch.float64):
    """Random inputs in fp64 whose values ``dtype`` can hold exactly; A, D, bias and state stay fp32."""
    shape = (batch, states, length) if groups is None else (batch, groups, states, length)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = {
        "u": torch.randn(batch, dim, length).to(dtype),
        "delta": torch.randn(batch, dim, length).to(dtype),
        "A": -torch.rand(dim, states).add(0.05).mul(torch.arange(1, states + 1)).to(wide),
        "B": torch.randn(shape).to(dtype),
        "C": torch.randn(shape).to(dtype),
        "D": torch.randn(dim).to(wide),
        "z": torch.randn(batch, dim, length).to(dtype),
        "delta_bias": torch.randn(dim).to(wide),
        "initial_state": torch.randn(batch, dim, states).to(wide),
    }
    return {name: value.double() for name, value in values.items()}


def run(inputs, dtype, dout, **options):
    """Output, last state and gradients of ``selective_scan`` on ``inputs`` in ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = {"u": dtype, "delta": dtype, "B": dtype, "C": dtype, "z": dtype}
    leaves = {k: v.detach().to(kinds.get(k, wide)).requires_grad_() for k, v in inputs.items()}
    out, last = selective_scan(**leaves, return_last_state=True, **options)
    assert out.dtype == dtype and last.dtype == wide and not last.requires_grad
    out.backward(dout.to(dtype))
    return out.detach(), last, {k: v.grad for k, v in leaves.items()}


def truth(inputs, dout, **options):
    """The same in fp64 from the formula."""
    leaves = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    out, last = formula(**{name: leaves.get(name) for name in NAMES}, **options)
    out.backward(dout)
    return out.detach(), last.detach(), {k: v.grad for k, v in leaves.items()}


def compare(inputs, dtype, relative_error, forward_limit, gradient_limit, starts=None, reverse=False):
    dout = torch.randn(inputs["u"].shape).to(dtype).double()
    expected = truth(inputs, dout, starts=starts, reverse=reverse)
    actual = run(inputs, dtype, dout, delta_softplus=True, reverse=reverse, segment_starts=starts)
    assert relative_error(actual[0], expected[0]) <= forward_limit
    assert relative_error(actual[1], expected[1]) <= forward_limit
    for name, gradient in expected[2].items():
        assert relative_error(actual[2][name], gradient) <= gradient_limit, name


@pytest.mark.parametrize("length", LENGTHS)
def test_fp64_equals_the_formula(length, every_kernel, relative_error):
    compare(draw(length), torch.float64, relative_error, 1e-13, 1e-12, reverse=length % 2 == 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_fp32_is_within_the_contract(length, reverse, every_kernel, relative_error):
    inputs = draw(length, dim=37, dtype=torch.float32)
    compare(inputs, torch.float32, relative_error, 1e-5, 5e-5, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_the_contract(dtype, every_kernel, relative_error):
    compare(draw(63, dim=6, dtype=dtype), dtype, relative_error, 3e-3, 5e-3)


@pytest.mark.parametrize(
    ("dim", "groups", "states"), [(6, 1, 16), (6, 2, 16), (40, 2, 5), (4, 4, 33), (1, 1, 1)]
)
def test_groups_and_odd_sizes(dim, groups, states, every_kernel, relative_error):
    for reverse in (False, True):
        inputs = draw(40, dim=dim, groups=groups, states=states)
        compare(inputs, torch.float64, relative_error, 1e-13, 1e-12, reverse=reverse)


def test_more_parts_of_the_backward_pass_than_vectors(every_kernel, relative_error):
    # 9 vectors of 16 channels in 4 parts: the last has none
    inputs = draw(40, dim=144, batch=1, dtype=torch.float32)
    compare(inputs, torch.float32, relative_error, 1e-5, 5e-5)


@pytest.mark.parametrize("length", [3, 16, 53])
@pytest.mark.parametrize("reverse", [False, True])
def test_memory_in_any_order(length, reverse, every_kernel, relative_error):
    """Views whose last axis is strided, or whose rows lie far apart, give what dense tensors give."""
    inputs = {k: v.float() for k, v in draw(length, dim=48).items()}
    dense = selective_scan(**inputs, delta_softplus=True, reverse=reverse)
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["z"] = torch.cat([inputs["z"], torch.full((2, 48, 7), float("nan"))], 2)[..., :length]
    both = torch.cat([inputs["B"], inputs["C"]], 1)
    inputs["B"], inputs["C"] = both[:, :16], inputs["C"].transpose(1, 2).contiguous().transpose(1, 2)
    compare(inputs, torch.float32, relative_error, 1e-5, 5e-5, reverse=reverse)
    strided = selective_scan(**inputs, delta_softplus=True, reverse=reverse)
    assert relative_error(strided, dense) < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_do_not_see_each_other(reverse, every_kernel, relative_error):
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[0, [0, 1, 32, 33, 69]] = True
    starts[1, 40] = True
    compare(draw(70), torch.float64, relative_error, 1e-13, 1e-12, starts=starts, reverse=reverse)
    # one mask for all rows, and the same as running each segment alone
    inputs = draw(70)
    del inputs["initial_state"]
    row = torch.zeros(70, dtype=torch.bool)
    row[31] = True
    whole = selective_scan(**inputs, delta_softplus=True, reverse=reverse, segment_starts=row)
    cut = (
        {k: v[..., s] if v.shape[-1] == 70 else v for k, v in inputs.items()}
        for s in (slice(31), slice(31, 70))
    )
    alone = torch.cat([selective_scan(**part, delta_softplus=True, reverse=reverse) for part in cut], -1)
    assert relative_error(whole, alone) < 1e-13


def test_every_optional_argument_may_be_missing(every_kernel, relative_error):
    optional = ("D", "z", "delta_bias", "initial_state")
    for count in range(len(optional) + 1):
        for missing in itertools.combinations(optional, count):
            inputs = {k: v for k, v in draw(9, dim=3, states=2).items() if k not in missing}
            compare(inputs, torch.float64, relative_error, 1e-13, 1e-12)


def test_reverse_is_the_scan_of_the_reversed_sequence(every_kernel, relative_error):
    inputs = draw(45)
    flipped = {k: v.flip(-1) if v.shape[-1] == 45 else v for k, v in inputs.items()}
    out, last = selective_scan(**inputs, delta_softplus=True, reverse=True, return_last_state=True)
    other, other_last = selective_scan(**flipped, delta_softplus=True, return_last_state=True)
    assert relative_error(out, other.flip(-1)) < 1e-14
    assert relative_error(last, other_last) < 1e-14


def test_state_continues_a_sequence(every_kernel, relative_error):
    inputs = draw(50)
    whole = selective_scan(**inputs, delta_softplus=True)
    parts, state = [], inputs.pop("initial_state")
    for cut in (slice(0, 1), slice(1, 33), slice(33, 50)):
        part = {k: v[..., cut] if v.shape[-1] == 50 else v for k, v in inputs.items()}
        out, state = selective_scan(**part, delta_softplus=True, initial_state=state, return_last_state=True)
        parts.append(out)
    assert relative_error(torch.cat(parts, -1), whole) < 1e-13


def test_strong_and_vanishing_decay_stays_finite(every_kernel, relative_error):
    inputs = draw(197, dtype=torch.float32)
    inputs["A"] = inputs["A"] * 100
    inputs["delta"] = inputs["delta"] * 10
    compare(inputs, torch.float32, relative_error, 1e-5, 5e-5)
    inputs["A"] = torch.full_like(inputs["A"], -1e-6)
    compare(inputs, torch.float32, relative_error, 1e-5, 5e-5)


def test_nan_is_not_hidden(every_kernel):
    inputs = {k: v.float() for k, v in draw(40).items()}
    inputs["delta"][0, 2, 20] = float("nan")
    out = selective_scan(**inputs, delta_softplus=True)
    assert out[0, 2, 20:].isnan().all() and out[0, 2, :20].isfinite().all()
    assert out[1].isfinite().all() and out[0, [0, 1, 3, 4]].isfinite().all()


def test_transposed_inputs_and_threads_change_nothing(monkeypatch):
    inputs = {k: v.float() for k, v in draw(300, dim=64, batch=3).items()}
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in inputs.items()}
    results = []
    for threads, values in ((1, inputs), (2, inputs), (2, strided)):
        torch.set_num_threads(threads)
        out, _, gradients = run(values, torch.float32, inputs["z"], delta_softplus=True)
        results.append([out, *gradients.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_operator_keeps_its_promises_to_the_dispatcher(scan_backend):
    inputs = draw(37, dim=6, groups=2, states=3)
    segments = torch.zeros(2, 37, dtype=torch.int32)
    segments[:, 20:] = 1
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    opcheck(torch.ops.vlm.selective_scan.default, (*leaves, segments, True, True, True))
    bare = [leaf if i < 5 else None for i, leaf in enumerate(leaves)]
    opcheck(torch.ops.vlm.selective_scan.default, (*bare, None, False, False, True))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(scan_backend, reverse):
    inputs = draw(5, dim=3, groups=1, states=2)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    starts = torch.tensor([False, False, True, False, False])

    def scan(*values):
        named = dict(zip(NAMES, values, strict=True))
        return selective_scan(**named, delta_softplus=True, reverse=reverse, segment_starts=starts)

    assert torch.autograd.gradcheck(scan, leaves)


def test_a_second_derivative_is_refused():
    inputs = draw(4)
    inputs["u"].requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan(**inputs).sum(), inputs["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 5)}, r"u must be \(batch, dim, length\)"),
        ({"u": torch.zeros(2, 5, 0)}, "u must be .* non-empty"),
        ({"u": torch.zeros(2, 5, 8, dtype=torch.int64)}, "u must be .*int64"),
        ({"delta": torch.zeros(2, 5, 7)}, r"delta must be \(2, 5, 8\)"),
        ({"delta": torch.zeros(2, 5, 8)}, "delta must be torch.float64, got torch.float32"),
        ({"A": torch.zeros(4, 16)}, "A must be .dim=5"),
        ({"A": torch.zeros(5, 16, dtype=torch.bfloat16)}, "A must be torch.float32"),
        ({"A": torch.zeros(5, 16, dtype=torch.complex64)}, "A must be torch.float32"),
        ({"B": torch.zeros(5, 16, dtype=torch.float64)}, "B must depend on time"),
        ({"C": torch.zeros(5, 16, dtype=torch.float64)}, "C must depend on time"),
        ({"B": torch.zeros(2, 15, 8, dtype=torch.float64)}, "B must be"),
        ({"B": torch.zeros(2, 2, 16, 8, dtype=torch.float64)}, "B has 2 groups"),
        ({"C": torch.zeros(2, 5, 16, 8, dtype=torch.float64)}, "as many groups as B"),
        ({"D": torch.zeros(6)}, r"D must be \(5,\)"),
        ({"z": torch.zeros(2, 5, 9, dtype=torch.float64)}, "z must be"),
        ({"delta_bias": torch.zeros(5, 1)}, "delta_bias must be"),
        ({"initial_state": torch.zeros(2, 16, 5)}, "initial_state must be"),
        ({"segment_starts": torch.zeros(9, dtype=torch.bool)}, "segment_starts must be"),
        ({"segment_starts": torch.zeros(8)}, "segment_starts must be bool"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**draw(8), **change})
