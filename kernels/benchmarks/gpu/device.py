"""Everything that is asked of the device itself: its time, its memory, its name, what it was made to do."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

_MOST_RUNS = 200


class Device:
    """A GPU; or a CPU, which shows that the program runs and says nothing of the kernels.

    Attributes:
        place: Where tensors go.
        is_gpu: Whether time passes there and not here.
    """

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.is_gpu = place.type == "cuda"

    def synchronize(self) -> None:
        """Wait for everything that was queued."""
        if self.is_gpu:
            torch.cuda.synchronize(self.place)

    def once_ms(self, run: Callable[[], object]) -> float:
        """Return the device's time for one run."""
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1]))

    def time_ms(self, run: Callable[[], object], seconds: float) -> dict[str, float]:
        """Return median, least and spread of the device's time for ``run``, after one that warms up."""
        begin = time.perf_counter()
        run()
        self.synchronize()
        # what takes seconds is not the kernels' doing, and its spread is small beside the ratio
        least = 3 if time.perf_counter() - begin < 2 else 2
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < _MOST_RUNS):
            times.append(self.once_ms(run))
        quartiles = statistics.quantiles(times, n=4)
        return {
            "median_ms": statistics.median(times),
            "least_ms": min(times),
            "spread_ms": quartiles[2] - quartiles[0],
            "runs": len(times),
        }

    def host_us(self, run: Callable[[], object], calls: int) -> float:
        """Return the host's time for one of ``calls`` calls that follow each other, in microseconds."""
        run()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken = time.perf_counter() - start
        self.synchronize()
        return 1e6 * taken / calls

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """Return how much memory a run takes beyond what is there before it; None where nobody counts."""
        if not self.is_gpu:
            run()
            return None
        self.synchronize()
        self.release()
        before = torch.cuda.memory_allocated(self.place)
        torch.cuda.reset_peak_memory_stats(self.place)
        run()
        self.synchronize()
        return float((torch.cuda.max_memory_allocated(self.place) - before) / 2**20)

    def release(self) -> None:
        """Give memory that nothing uses back."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def launches(self, run: Callable[[], object]) -> list[str]:
        """Return the names of what a run launches, copies and fills included; of the operators on a CPU."""
        run()
        self.synchronize()
        wanted = ProfilerActivity.CUDA if self.is_gpu else ProfilerActivity.CPU
        with profile(activities=list({ProfilerActivity.CPU, wanted})) as recorded:
            run()
            self.synchronize()
        kind = DeviceType.CUDA if self.is_gpu else DeviceType.CPU
        events = recorded.events() or []
        return [each.name for each in events if each.device_type == kind and each.cpu_parent is None]

    def architecture(self) -> str:
        """Return what nvcc calls it."""
        major, minor = torch.cuda.get_device_capability(self.place) if self.is_gpu else (9, 0)
        return f"sm_{major}{minor}"

    def clocks_per_s(self) -> float:
        """Return the clocks of all multiprocessors in a second, 0 if unknown."""
        if not self.is_gpu:
            return 0.0
        megahertz = _query("clocks.max.sm")
        count = torch.cuda.get_device_properties(self.place).multi_processor_count
        return 1e6 * float(megahertz) * count if megahertz else 0.0

    def describe(self) -> dict[str, Any]:
        """Name what the figures were taken on."""
        if not self.is_gpu:
            return {}
        about = torch.cuda.get_device_properties(self.place)
        return {
            "gpu": about.name,
            "multiprocessors": about.multi_processor_count,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _query("driver_version"),
            "clock_mhz": _query("clocks.max.sm"),
        }


def _query(field: str) -> str:
    """Ask nvidia-smi; empty if it is not there."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""
