"""What is timed: sizes, how inputs of those sizes are drawn, and what is right for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.ops import Branch, bidirectional_mamba
from vlm.ops.backends import VARIABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size.

    Attributes:
        name: Key in the results.
        kind: ``scan`` (one direction with D, bias, softplus and gate) or ``block`` (convolutions, projections
            and both scans).
        batch: Sequences.
        length: Steps of each.
        channels: Channels of the scan.
        states: States of each channel.
        rank: Columns of x_proj's output that belong to dt.
    """

    name: str
    kind: str
    batch: int
    length: int
    channels: int
    states: int = 16
    rank: int = 12

    @property
    def updates(self) -> int:
        """State updates of one forward pass."""
        directions = 1 if self.kind == "scan" else 2
        return directions * self.batch * self.length * self.channels * self.states


# two and eight frames of VideoMamba-Ti, and a block of the size that the demonstration model trains with
CASES = (
    Case(name="scan-L393", kind="scan", batch=4, length=393, channels=384),
    Case(name="scan-L1569", kind="scan", batch=4, length=1569, channels=384),
    Case(name="block-L257", kind="block", batch=8, length=257, channels=320, rank=10),
)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Have ``backend`` serve every operator inside; the environment is as before afterwards."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def draw(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the inputs of a case, the same numbers for every dtype.

    A scan has u, z, delta (b, l, e), rows [B | C] (b, l, 2n), A (e, n), D (e,), bias (e,); a block has xz
    (b, l, 2e) and seven parameters for each direction.
    """
    torch.manual_seed(0)
    e, n, r = case.channels, case.states, case.rank
    if case.kind == "scan":
        drawn = [torch.randn(case.batch, case.length, e) for _ in range(3)]
        drawn.append(torch.randn(case.batch, case.length, 2 * n))
        drawn += [-torch.arange(1.0, n + 1).repeat(e, 1), torch.ones(e), torch.randn(e)]
    else:
        shapes = [(e, 4), (e,), (r + 2 * n, e), (e, r), (e,), (e, n), (e,)]
        drawn = [torch.randn(case.batch, case.length, 2 * e)]
        drawn += [0.1 * torch.randn(shape) for shape in shapes * 2]
    return [x.to(dtype) for x in drawn]


def job(case: Case, leaves: list[Tensor], *, gradient: bool) -> Callable[[], Tensor]:
    """Return the forward computation through the operators, channels-last: (b, l, e)."""
    if case.kind == "block":
        forward, backward = Branch(*leaves[1:8]), Branch(*leaves[8:])
        return lambda: bidirectional_mamba(leaves[0], forward, backward)
    u, z, delta, rows, A, D, bias = leaves

    def run() -> Tensor:
        arguments = (u, None, z, delta, None, rows, None, A, None, D, None, bias, *(None,) * 4, gradient)
        out: Tensor = torch.ops.vlm.bi_scan(*arguments)[0]
        return out

    return run


def weights(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the gradient (b, l, e) that flows into the output: a wave, no two steps alike."""
    steps = torch.arange(case.length, dtype=dtype).unsqueeze(1)
    channels = torch.arange(case.channels, dtype=dtype)
    wave = torch.cos(0.1 * steps + 0.7 * channels)
    return wave.expand(case.batch, case.length, case.channels).contiguous()


def truth(case: Case, *, gradient: bool) -> list[Tensor]:
    """Return the output and, if asked, the gradients of every leaf, in fp64 by the reference loop."""
    leaves = [x.requires_grad_(gradient) for x in draw(case, torch.float64)]
    with forced("reference"):
        out = job(case, leaves, gradient=gradient)()
        if not gradient:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, weights(case, torch.float64))]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the greatest relative L2 error of any tensor; infinite if one is not finite or misshapen."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        worst = max(worst, float((a.double() - b).norm() / b.norm().clamp_min(1e-30)))
    return worst
