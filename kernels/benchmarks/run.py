"""Time the CPU kernels beside the PyTorch implementations: python kernels/benchmarks/run.py [--out FILE].

Ratios are of processor time, summed over threads, at its least: on a shared machine wall time says more
about the neighbours. One thread is the default, as waiting threads would count too; wall time is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, job

from vlm.ops import cpu_library
from vlm.ops.backends import VARIABLE

BACKENDS = ("cpu", "chunked", "reference")
# multiply-unit instructions for each vector of state updates: power of two 5, decay and input 3, output 1;
# the backward pass repeats all but the output, accumulates dC, and takes 7 more
FORWARD_OPERATIONS = 9
BACKWARD_OPERATIONS = 16


def main(argv: list[str] | None = None) -> int:
    """Run every case, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only this case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time spent on one measurement")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not cpu_library.available(torch.float32):
        print(f"no C++ kernels: {cpu_library.unavailable_reason(torch.float32)}", file=sys.stderr)
        return 1
    peak = multiply_adds_per_second()
    results: dict[str, Any] = {"machine": machine(), "multiply_adds_per_s": peak, "cases": {}}
    for case in CASES:
        if arguments.case and case.name not in arguments.case:
            continue
        results["cases"][case.name] = measure_case(case, arguments.seconds, peak)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure_case(case: Case, seconds: float, peak: float) -> dict[str, Any]:
    """Time forward, and forward with backward, on every backend; print one line each."""
    row: dict[str, Any] = {"updates": case.updates}
    for mode, operations in (
        ("forward", FORWARD_OPERATIONS),
        ("forward_backward", FORWARD_OPERATIONS + BACKWARD_OPERATIONS),
    ):
        times = {name: measure(case, name, seconds, gradient=mode != "forward") for name in BACKENDS}
        floor = 1e3 * case.updates * operations / peak
        ours = times["cpu"]["cpu_ms"]
        ratios = {f"{name}_over_cpu": times[name]["cpu_ms"] / ours for name in BACKENDS[1:]}
        row[mode] = {"times": times, "floor_ms": floor, "cpu_over_floor": ours / floor, **ratios}
        print(
            f"{case.name:12s} {mode:17s} cpu {ours:9.2f} ms ({ours / floor:.1f} x floor)   "
            + "   ".join(
                f"{name} {times[name]['cpu_ms']:.0f} ms = {times[name]['cpu_ms'] / ours:.1f} x"
                for name in BACKENDS[1:]
            ),
            flush=True,
        )
    return row


def measure(case: Case, name: str, seconds: float, *, gradient: bool) -> dict[str, float]:
    """Return the least processor time and wall time of one computation on one backend, in milliseconds."""
    os.environ[VARIABLE] = name
    try:
        run, leaves = job(case, gradient=gradient)

        def once() -> None:
            out = run()
            if gradient:
                torch.autograd.grad(out, leaves, torch.ones_like(out))

        return repeat(once, seconds)
    finally:
        del os.environ[VARIABLE]


def repeat(once: Callable[[], None], seconds: float) -> dict[str, float]:
    """Call once to warm up, then for ``seconds``, at least once and at most fifty times."""
    once()
    processor: list[float] = []
    wall: list[float] = []
    begin = time.perf_counter()
    while len(wall) < 50 and (not wall or time.perf_counter() - begin < seconds):
        start, start_processor = time.perf_counter(), time.process_time()
        once()
        processor.append(1e3 * (time.process_time() - start_processor))
        wall.append(1e3 * (time.perf_counter() - start))
    return {"cpu_ms": min(processor), "wall_ms": min(wall), "runs": len(wall)}


def multiply_adds_per_second() -> float:
    """Return what a large matrix product reaches for each second of processor time: the floor's unit."""
    size = 1024
    a, out = torch.randn(size, size), torch.empty(size, size)

    def product() -> None:
        torch.mm(a, a, out=out)

    return 1e3 * size**3 / repeat(product, 1.0)["cpu_ms"]


def machine() -> dict[str, Any]:
    """Name what the figures were taken on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": {n: name for name, n in cpu_library.LEVELS.items()}[cpu_library.level()],
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
