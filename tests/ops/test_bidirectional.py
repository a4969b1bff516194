"""The two-directional mixer against a composition of its definition, with flips, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

from vlm.ops import Branch, bidirectional_mamba, cpu_library, selective_scan
from vlm.ops.backends import VARIABLE
from vlm.ops.cuda import arguments as cuda_arguments

RANK, STATES = 3, 16


def parameters(dim, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    return [
        draw(dim, 1, 4),
        draw(dim),
        (draw(RANK + 2 * STATES, dim) * 0.2).detach().requires_grad_(),
        draw(dim, RANK),
        draw(dim),
        torch.rand(dim, STATES, dtype=torch.float64).to(dtype).requires_grad_(),
        draw(dim),
    ]


def one_way(x, z, p):
    """One branch by its definition, forward in time, batch first, channels last."""
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = p
    dim, length = x.shape[2], x.shape[1]
    c = F.silu(F.conv1d(x.transpose(1, 2), conv_weight, conv_bias, padding=3, groups=dim)[..., :length])
    dt, B, C = (c.transpose(1, 2) @ x_proj.T).split([RANK, STATES, STATES], -1)
    dt = F.softplus(dt @ dt_proj.T + dt_bias)
    A = -torch.exp(A_log)
    h, out = x.new_zeros(x.shape[0], dim, STATES), []
    for t in range(length):
        u = c[..., t]
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u)[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1) + D * u)
    return torch.stack(out, 1) * F.silu(z)


def definition(xz, forward, backward):
    x, z = xz.chunk(2, -1)
    return one_way(x, z, forward) + one_way(x.flip(1), z.flip(1), backward).flip(1)


@pytest.mark.parametrize(("length", "dim"), [(1, 5), (2, 16), (33, 37), (64, 3)])
def test_equals_its_definition(length, dim, every_kernel, relative_error):
    leaves = [torch.randn(2, length, 2 * dim, dtype=torch.float64).requires_grad_()]
    leaves += parameters(dim) + parameters(dim)
    expected = definition(leaves[0], leaves[1:8], leaves[8:])
    dout = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, leaves, dout)
    for dtype, limit, gradient_limit in ((torch.float64, 1e-12, 1e-11), (torch.float32, 1e-5, 5e-5)):
        values = [v.detach().to(dtype).requires_grad_() for v in leaves]
        out = bidirectional_mamba(values[0], Branch(*values[1:8]), Branch(*values[8:]))
        assert relative_error(out, expected) < limit
        for a, b in zip(torch.autograd.grad(out, values, dout.to(dtype)), truth, strict=True):
            assert relative_error(a, b) < gradient_limit
        with torch.no_grad():
            inference = bidirectional_mamba(values[0], Branch(*values[1:8]), Branch(*values[8:]))
        assert torch.equal(inference, out)


def test_half_precision_keeps_sums_in_fp32(scan_backend, relative_error):
    leaves = [torch.randn(2, 50, 32).to(torch.bfloat16)]
    leaves += [v.detach() for v in parameters(16, torch.float32) + parameters(16, torch.float32)]
    expected = bidirectional_mamba(
        leaves[0].double(), *(Branch(*(v.double() for v in p)) for p in (leaves[1:8], leaves[8:]))
    )
    out = bidirectional_mamba(leaves[0], Branch(*leaves[1:8]), Branch(*leaves[8:]))
    assert out.dtype == torch.bfloat16
    # u, delta, B and C are rounded to 8 bits between the operators
    assert relative_error(out, expected) < 1e-2


def test_segments_do_not_see_each_other(every_kernel, relative_error):
    xz = torch.randn(2, 40, 12, dtype=torch.float64)
    forward, backward = (Branch(*(v.detach() for v in parameters(6))) for _ in range(2))
    starts = torch.zeros(40, dtype=torch.bool)
    starts[[0, 7, 33]] = True
    alone = [bidirectional_mamba(part, forward, backward) for part in xz.split([7, 26, 7], 1)]
    whole = bidirectional_mamba(xz, forward, backward, segment_starts=starts)
    assert relative_error(whole, torch.cat(alone, 1)) < 1e-13


def test_packed_clips_train_as_they_would_alone(every_kernel, relative_error):
    """Clips of different lengths, concatenated; each row of the batch is cut elsewhere."""
    cuts = [(5, 1, 20, 14), (17, 23)]
    values = [torch.randn(2, 40, 12, dtype=torch.float64).requires_grad_(), *parameters(6), *parameters(6)]
    starts = torch.zeros(2, 40, dtype=torch.bool)
    for row, lengths in enumerate(cuts):
        starts[row, torch.tensor((0, *lengths[:-1])).cumsum(0)] = True
    branches = Branch(*values[1:8]), Branch(*values[8:])
    packed = bidirectional_mamba(values[0], *branches, segment_starts=starts)
    rows = [
        torch.cat([bidirectional_mamba(clip[None], *branches)[0] for clip in values[0][row].split(lengths)])
        for row, lengths in enumerate(cuts)
    ]
    alone = torch.stack(rows)
    assert relative_error(packed, alone) < 1e-13
    dout = torch.randn_like(alone)
    found = torch.autograd.grad(packed, values, dout)
    for a, b in zip(found, torch.autograd.grad(alone, values, dout), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("name", ["chunked", "cpu"])
def test_twice_is_the_same_to_the_bit_with_threads(name, monkeypatch):
    if name == "cpu" and not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    monkeypatch.setenv(VARIABLE, name)
    torch.set_num_threads(2)
    p = [v.float().detach().requires_grad_() for v in parameters(64) + parameters(64)]
    # enough updates that the C++ kernels share them out
    xz = torch.randn(3, 150, 128).requires_grad_()

    def run():
        out = bidirectional_mamba(xz, Branch(*p[:7]), Branch(*p[7:]))
        return [out, *torch.autograd.grad(out.square().sum(), [xz, *p])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_modules_are_called_so_adapters_take_part(scan_backend, relative_error):
    p = [v.detach() for v in parameters(6)]
    x_proj, dt_proj = nn.Linear(6, RANK + 2 * STATES, bias=False), nn.Linear(RANK, 6)
    x_proj.weight, dt_proj.weight, dt_proj.bias = (nn.Parameter(p[i]) for i in (2, 3, 4))
    xz = torch.randn(2, 9, 12, dtype=torch.float64)
    by_weight = bidirectional_mamba(xz, Branch(*p), None)
    by_module = bidirectional_mamba(xz, Branch(p[0], p[1], x_proj, dt_proj, None, *p[5:]), None)
    assert relative_error(by_module, by_weight) < 1e-13
    called = []
    hook = dt_proj.register_forward_hook(lambda _module, _inputs, out: (called.append(1), out + 1)[1])
    changed = bidirectional_mamba(xz, Branch(p[0], p[1], x_proj, dt_proj, None, *p[5:]), None)
    hook.remove()
    assert called and relative_error(changed, by_weight) > 1e-3
    with pytest.raises(ValueError, match="bias of its own"):
        Branch(p[0], p[1], x_proj, dt_proj, p[4], *p[5:])


def test_shapes_that_do_not_fit_are_named():
    p = [v.detach() for v in parameters(6)]
    with pytest.raises(ValueError, match=r"xz must be \(batch, length, 12\)"):
        bidirectional_mamba(torch.zeros(2, 4, 10), Branch(*p), None)
    xz = torch.zeros(2, 4, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="forward.x_proj must give more than"):
        bidirectional_mamba(xz, Branch(p[0], p[1], p[2][: 2 * STATES], *p[3:]), None)
    with pytest.raises(ValueError, match=r"forward.dt_proj must be \(6, 3\), got \(5, 3\)"):
        bidirectional_mamba(xz, Branch(*p[:3], p[3][:5], *p[4:]), None)


def test_the_operator_keeps_its_promises_to_the_dispatcher(scan_backend):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    sequence, rows = (2, 9, 3), (2, 9, 8)
    A = [(-torch.rand(3, 4, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    both = [draw(*sequence) for _ in range(5)] + [draw(*rows), draw(*rows), *A] + [draw(3) for _ in range(4)]
    both += [None, None]
    segments = torch.arange(9, dtype=torch.int32).div(4, rounding_mode="floor").expand(2, 9).contiguous()
    opcheck(torch.ops.vlm.bi_scan.default, (*both, segments, True))
    ranked = [draw(2, 9, 2) if i in (3, 4) else v for i, v in enumerate(both[:13])] + [draw(3, 2), draw(3, 2)]
    opcheck(torch.ops.vlm.bi_scan.default, (*ranked, segments, True))
    one = [None if i in (1, 4, 6, 8, 10, 11, 12, 14) else v for i, v in enumerate(both)]
    opcheck(torch.ops.vlm.bi_scan.default, (*one, None, True))
    one[3], one[13] = ranked[3], ranked[13]
    opcheck(torch.ops.vlm.bi_scan.default, (*one, None, True))


def test_weights_are_multiplied_with_in_the_operator(scan_backend, relative_error):
    """Rows and a weight give what their product gives, and all gradients."""

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    u_f, u_b, z, dt_f, dt_b = *(draw(2, 9, 3) for _ in range(3)), draw(2, 9, 2), draw(2, 9, 2)
    bc_f, bc_b, W_f, W_b = draw(2, 9, 8), draw(2, 9, 8), draw(3, 2), draw(3, 2)
    rest = [-torch.rand(3, 4, dtype=torch.float64)] * 2 + [draw(3) for _ in range(4)]
    leaves = [u_f, u_b, z, dt_f, dt_b, bc_f, bc_b, W_f, W_b, *rest[2:]]

    def mix(delta_f, delta_b, *weights):
        inputs = (u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, *rest, *weights, None, True)
        out = torch.ops.vlm.bi_scan(*inputs)[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    expected = mix(dt_f @ W_f.t(), dt_b @ W_b.t(), None, None)
    for mine, truth in zip(mix(dt_f, dt_b, W_f, W_b), expected, strict=True):
        assert relative_error(mine, truth) < 1e-13


def test_autocast_does_not_reach_into_the_operator(scan_backend):
    """Full precision that somebody hands over stays full precision."""
    inputs = [torch.randn(1, 5, 3) for _ in range(3)] + [torch.randn(1, 5, 2), torch.randn(1, 5, 2)]
    inputs += [torch.randn(1, 5, 8) for _ in range(2)] + [-torch.rand(3, 4) for _ in range(2)]
    inputs += [torch.randn(3) for _ in range(4)] + [torch.randn(3, 2) for _ in range(2)]
    plain = torch.ops.vlm.bi_scan(*inputs, None, False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.ops.vlm.bi_scan(*inputs, None, False)[0]
    assert torch.equal(plain, inside)


def test_filled_rows_compile_in_one_graph(monkeypatch):
    """What a GPU gets: x_proj with zero rows, from a plain layer too."""
    monkeypatch.setattr(cuda_arguments, "on_gpu", lambda _tensor: True)
    xz = torch.randn(2, 9, 12).requires_grad_()
    p = [v.float().detach().requires_grad_() for v in parameters(6)]
    x_proj = nn.Linear(6, RANK + 2 * STATES, bias=False)
    branch = Branch(p[0], p[1], x_proj, *p[3:])
    leaves = [xz, *p[:2], x_proj.weight, *p[3:]]

    def whole(values):
        return bidirectional_mamba(values, branch, branch).square().mean()

    expected = torch.autograd.grad(whole(xz), leaves)
    found = torch.autograd.grad(torch.compile(whole, fullgraph=True, backend="aot_eager")(xz), leaves)
    monkeypatch.undo()
    for mine, eager, plain in zip(found, expected, torch.autograd.grad(whole(xz), leaves), strict=True):
        assert torch.allclose(mine, eager, atol=1e-6, rtol=1e-5)
        assert torch.allclose(mine, plain, atol=1e-6, rtol=1e-5)


def test_an_exported_program_gives_the_same_numbers(scan_backend):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.ParameterList(v.float().detach() for v in parameters(6) + parameters(6))

        def forward(self, xz, starts):
            branches = Branch(*self.values[:7]), Branch(*self.values[7:])
            return bidirectional_mamba(xz, *branches, segment_starts=starts)

    mixer, starts = Mixer(), torch.tensor([True, False, False, True, False, True, False])
    inputs = torch.randn(2, 7, 12), starts
    program = torch.export.export(mixer, inputs).module()
    other = torch.randn(2, 7, 12), starts.roll(1)
    for values in (inputs, other):
        assert torch.equal(program(*values), mixer(*values))


def test_compiles_in_one_graph():
    leaves = [
        torch.randn(2, 9, 12).requires_grad_(),
        *(v.float().detach().requires_grad_() for v in parameters(6)),
    ]

    def whole(*values):
        mixed = bidirectional_mamba(values[0], Branch(*values[1:]), Branch(*values[1:]))
        rows = mixed.transpose(1, 2).contiguous()
        B, C = rows[:, :3], rows[:, 3:]
        return (
            selective_scan(rows, rows, -torch.exp(values[6][:, :3]), B, C, delta_softplus=True)
            .square()
            .mean()
        )

    expected = torch.autograd.grad(whole(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(whole, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(compiled, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)
