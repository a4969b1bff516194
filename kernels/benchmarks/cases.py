"""What is timed: sizes, and how inputs of those sizes are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.ops import Branch, bidirectional_mamba

Job = tuple[Callable[[], Tensor], list[Tensor]]


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


def job(case: Case, *, gradient: bool) -> Job:
    """Return the forward computation of a case and the leaves whose gradients belong to it."""
    torch.manual_seed(0)
    return _scan(case, gradient) if case.kind == "scan" else _block(case, gradient)


def _scan(case: Case, gradient: bool) -> Job:
    """One direction through ``vlm::bi_scan``, channels-last."""
    sequence = (case.batch, case.length, case.channels)
    u, z, delta = (torch.randn(sequence) for _ in range(3))
    rows = torch.randn(case.batch, case.length, 2 * case.states)
    A = -torch.arange(1.0, case.states + 1).repeat(case.channels, 1)
    leaves = [u, z, delta, rows, A, torch.ones(case.channels), torch.randn(case.channels)]
    leaves = [x.requires_grad_(gradient) for x in leaves]
    u, z, delta, rows, A, D, bias = leaves

    def run() -> Tensor:
        arguments = (u, None, z, delta, None, rows, None, A, None, D, None, bias, *(None,) * 4, gradient)
        out: Tensor = torch.ops.vlm.bi_scan(*arguments)[0]
        return out

    return run, leaves


def _block(case: Case, gradient: bool) -> Job:
    """Everything between the projections in and out."""
    e, n, r = case.channels, case.states, case.rank
    shapes = [(e, 4), (e,), (r + 2 * n, e), (e, r), (e,), (e, n), (e,)]
    leaves = [torch.randn(case.batch, case.length, 2 * e)]
    leaves += [0.1 * torch.randn(shape) for shape in shapes * 2]
    leaves = [x.requires_grad_(gradient) for x in leaves]
    forward, backward = Branch(*leaves[1:8]), Branch(*leaves[8:])
    return (lambda: bidirectional_mamba(leaves[0], forward, backward)), leaves
