"""The moving average of the weights, which is evaluated and saved in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class MovingAverage:
    """An exponential moving average of weights and running statistics, swapped in for evaluation and saving.

    Args:
        module: Whose learning weights and floating-point buffers are followed.
        decay: Share of the old average that stays at each update; 0 keeps no average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        learning = [p for p in module.parameters() if p.requires_grad]
        statistics = [b for b in module.buffers() if b.is_floating_point()]
        self._weights: list[torch.Tensor] = [*learning, *statistics] if decay else []
        self.values = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after update ``step`` (from 0); early on faster, to forget the start."""
        if self._weights:
            decay = min(self._decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, self._weights, 1 - decay)

    @torch.no_grad()
    def load(self, values: list[torch.Tensor]) -> None:
        """Take over saved averages."""
        for value, saved in zip(self.values, values, strict=True):
            value.copy_(saved)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, value in zip(self._weights, self.values, strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)
