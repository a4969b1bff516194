"""One check of one device: who is compared, how the time is shared out, and whether numbers were right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from cases import forced
from gpu.build import Build
from gpu.device import Device

from vlm.errors import KernelError

Item = TypeVar("Item")
Figures = dict[str, Any]


class Session:
    """What the sections share.

    Attributes:
        device: Where everything runs.
        ours: The backend that is checked.
        rivals: What it is compared with, by name; what lets each of them serve.
        seconds: Least time spent on one measurement.
        is_small: Tiny sizes, to see that the program runs.
        is_right: Whether every number so far was right; ratios are worth nothing otherwise.
        is_broken: Whether something of ours could not be measured that should have been.
        build: What makes the published extensions, if their sources are at hand.
        copy_bytes_per_s: What the device copies, reading and writing together; 0 if it was not measured.
    """

    def __init__(
        self,
        device: Device,
        ours: str,
        *,
        seconds: float = 0.5,
        budget_s: float = 510.0,
        is_small: bool = False,
        build: Build | None = None,
    ) -> None:
        self.device = device
        self.ours = ours
        self.rivals: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "chunked": lambda: forced("chunked")
        }
        self.seconds = seconds
        self.is_small = is_small
        self.is_right = True
        self.is_broken = False
        self.build = build
        self.copy_bytes_per_s = 0.0
        self._last = self._end = time.perf_counter() + budget_s

    @property
    def is_over(self) -> bool:
        """Return whether there is no time left for anything."""
        return time.perf_counter() >= self._last

    def left_s(self) -> float:
        """Return the seconds that the present item has left."""
        return max(self._end - time.perf_counter(), 0.0)

    def shared_out(
        self, items: Sequence[Item], weight: Callable[[Item], float] = lambda _: 1.0
    ) -> Iterator[Item]:
        """Go through items, each of which may take its share of the time that is left by then.

        What one does not use goes to those behind it. Our own figures are taken beyond a share, comparisons
        are not.
        """
        end = self._end
        weights = [weight(item) for item in items]
        for place, item in enumerate(items):
            now = time.perf_counter()
            self._end = now + max(end - now, 0.0) * weights[place] / sum(weights[place:])
            yield item
        self._end = end

    def serving(self, name: str) -> AbstractContextManager[None]:
        """Let ours or a rival serve."""
        return self.rivals[name]() if name in self.rivals else forced(name)

    def measured(self, name: str, run: Callable[[], object]) -> Figures:
        """Time one run; what cannot be timed says why in ``error``."""
        if self.is_over or (name != self.ours and not self.left_s()):
            return {"error": "no time left"}
        try:
            with self.serving(name):
                figures: Figures = dict(self.device.time_ms(run, self.seconds))
                return figures
        except torch.OutOfMemoryError:
            self.is_broken |= name == self.ours
            self.device.release()
            return {"error": "out of memory"}
        except (KernelError, RuntimeError) as error:
            self.is_broken |= name == self.ours
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}

    def compared(self, title: str, runs: dict[str, Callable[[], object]]) -> Figures:
        """Time ours and its rivals; print a line, with ratios only if all numbers were right so far."""
        row: Figures = {name: self.measured(name, run) for name, run in runs.items()}
        ours = row[self.ours].get("median_ms")
        text = f"{title}: " + (f"{ours:.4g} ms" if ours else row[self.ours]["error"])
        for name in runs:
            other = row[name].get("median_ms")
            if name != self.ours and ours and other and self.is_right:
                row[name]["ratio"] = other / ours
                text += f"; {name} {other:.4g} ms = {other / ours:.1f} x"
        print(text, flush=True)
        return row

    def everybody(self, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
        """Return the same run for ours and every rival."""
        return dict.fromkeys((self.ours, *self.rivals), run)

    def beside_floor(self, row: Figures, floor_ms: float | None) -> None:
        """Add a floor to a row of ``compared``, and the share of it that ours reaches."""
        ours = row[self.ours].get("median_ms")
        if floor_ms and ours:
            row[self.ours] |= {"floor_ms": floor_ms, "share": floor_ms / ours}
            print(f"  {100 * floor_ms / ours:.0f} % of the floor, {floor_ms:.4g} ms", flush=True)

    def bytes_floor_ms(self, num_bytes: float) -> float | None:
        """Return how long the device takes to move so many bytes; None if its rate was not measured."""
        return 1e3 * num_bytes / self.copy_bytes_per_s if self.copy_bytes_per_s else None

    def wrong(self, what: str) -> None:
        """Note that a number is not what it should be."""
        self.is_right = False
        print(f"  WRONG {what}", flush=True)
