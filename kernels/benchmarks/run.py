"""Time the CPU kernels beside their rivals: python kernels/benchmarks/run.py [--out FILE].

Figures are of processor time, summed over threads: on a shared machine wall time says more about the
neighbours. All run by turns in one process, and a ratio is the median of the ratios of each turn. Every
output is compared with fp64, small cases first; a wrong one ends the program, as no ratio is worth printing
then. One thread is the default, as waiting threads would count too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, relative_error, truth
from rivals import BACKENDS, RIVALS, Task, compiled_library

from vlm.ops import cpu_library

# of outputs, and of the worst gradient; relative to the norm of the truth
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5
MODES = ("forward", "forward_backward")
# a turn repeats what is quick for so long, untimed first: after other work it takes some processors 10 ms
# to bring their widest vector units to full speed
WARM_UP_S = 0.02
TURN_S = 0.01
ISA_FLAGS = {"portable": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}


class Wrong(Exception):
    """A result is not what it should be; the message names it."""


def main(argv: list[str] | None = None) -> int:
    """Prove, run every case, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only this case")
    parser.add_argument("--backend", choices=RIVALS, default="cpu", help="what the others are compared with")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, help="the others (default: all)")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this mode")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time spent on each rival")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not cpu_library.available(torch.float32):
        print(f"no C++ kernels: {cpu_library.unavailable_reason(torch.float32)}", file=sys.stderr)
        return 1
    names = list(RIVALS) if arguments.rivals is None else arguments.rivals
    names = [arguments.backend, *(name for name in names if name != arguments.backend)]
    bound = updates_per_second()
    results: dict[str, Any] = {"commit": commit(), "machine": machine(), "bound_updates_per_s": bound}
    results["rivals"] = {name: RIVALS[name].what for name in names}
    results["cases"] = {}
    try:
        for case in CASES:
            if arguments.case and case.name not in arguments.case:
                continue
            prove(case)
            row: dict[str, Any] = {"sizes": sizes(case), "updates": case.updates}
            for mode in arguments.mode or MODES:
                row[mode] = measure(case, mode, names, arguments.seconds)
                show(case, mode, row[mode], bound)
            results["cases"][case.name] = row
    except Wrong as error:
        print(f"{error}; no ratio is worth printing", file=sys.stderr)
        return 1
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def prove(case: Case) -> None:
    """Compare outputs and gradients of every backend with fp64 on a small case of the same kind.

    Raises:
        Wrong: One of them is off.
    """
    small = Case(name="proof", kind=case.kind, batch=2, length=53, channels=40, states=case.states, rank=3)
    expected = truth(small, gradient=True)
    for name in BACKENDS:
        if small.kind in RIVALS[name].kinds:
            check(f"{name} on the small case", RIVALS[name].prepare(small, True), expected)


def check(name: str, task: Task, expected: list[torch.Tensor]) -> float:
    """Return the relative error of a task, the worst of its outputs and gradients.

    Raises:
        Wrong: It is beyond the tolerance.
    """
    gradient = len(expected) > 1
    actual = task.in_order(task.once(gradient=gradient))
    error: float = relative_error(actual[:1], expected[:1])
    if not error <= FORWARD_TOLERANCE:
        raise Wrong(f"{name}: the output is off by {error:.1e} of fp64, allowed {FORWARD_TOLERANCE:g}")
    if gradient:
        error = max(error, relative_error(actual[1:], expected[1:]))
        if not error <= GRADIENT_TOLERANCE:
            raise Wrong(f"{name}: a gradient is off by {error:.1e} of fp64, allowed {GRADIENT_TOLERANCE:g}")
    return error


def measure(case: Case, mode: str, names: list[str], seconds: float) -> dict[str, Any]:
    """Time every rival that can do the case, by turns; the first is what the others are compared with."""
    gradient = mode != "forward"
    expected = truth(case, gradient=gradient)
    tasks, row = {}, dict[str, Any]()
    for name in names:
        rival = RIVALS[name]
        if case.kind not in rival.kinds or (gradient and not rival.has_gradient):
            continue
        try:
            task = rival.prepare(case, gradient)
            # the first call compiles and warms up
            row[name] = {"error": check(f"{name} on {case.name}", task, expected)}
            tasks[name] = task
        except Wrong:
            raise
        except Exception as error:  # a rival that cannot run here is a result too
            if name == names[0]:
                raise
            row[name] = {"cannot_run": f"{type(error).__name__}: {str(error)[:300]}"}
    times = take_turns({name: _call(task, gradient) for name, task in tasks.items()}, seconds)
    for name, task in tasks.items():
        row[name]["error"] = max(row[name]["error"], check(f"{name} on {case.name}", task, expected))
        row[name].update(summary(times[name]))
        if name != names[0]:
            ratios = [theirs / ours for theirs, ours in zip(times[name], times[names[0]], strict=False)]
            row[name]["ratio"] = statistics.median(ratios)
    return row


def _call(task: Task, gradient: bool) -> Callable[[], Any]:
    return lambda: task.once(gradient=gradient)


def take_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return the processor time of one call, in ms, for every turn.

    A rival drops out once it had its seconds, the first stays until all have; fifty turns at most.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    first, *others = calls
    for _ in range(50):
        waiting = [name for name in others or [first] if not times[name] or spent[name] < seconds]
        if not waiting:
            break
        for name in dict.fromkeys([first, *waiting]):
            begin = time.perf_counter()
            repeat(calls[name], min(WARM_UP_S, seconds))
            times[name].append(repeat(calls[name], min(TURN_S, seconds)))
            spent[name] += time.perf_counter() - begin
    return times


def repeat(call: Callable[[], Any], seconds: float) -> float:
    """Call for so long, at least once; return the processor time of one call, in ms."""
    begin, start, number = time.perf_counter(), time.process_time(), 0
    while not number or time.perf_counter() - begin < seconds:
        call()
        number += 1
    return 1e3 * (time.process_time() - start) / number


def summary(times: list[float]) -> dict[str, float]:
    """Return the median, the least and the spread (half of the turns lie so far apart, relative)."""
    median = statistics.median(times)
    spread = 0.0
    if len(times) > 3:
        low, _, high = statistics.quantiles(times, n=4)
        spread = (high - low) / median
    return {"median_ms": median, "least_ms": min(times), "spread": spread, "turns": len(times)}


def show(case: Case, mode: str, row: dict[str, Any], bound: float) -> None:
    """Print one line for each rival, the first to be beaten first."""
    first, *others = row
    ours = row[first]["median_ms"]
    line = f"{case.name} {mode}: {first} {ours:.2f} ms, {1e-6 * case.updates / ours:.2f} G updates/s"
    if mode == "forward":
        share = 1e3 * case.updates / bound / row[first]["least_ms"]
        row[first]["share_of_bound"] = share
        line += f", {100 * share:.0f} % of the bound"
    print(line)
    for name in sorted(others, key=lambda name: row[name].get("ratio", float("inf"))):
        if "cannot_run" in row[name]:
            print(f"  {name:14s} cannot run: {row[name]['cannot_run']}")
        else:
            print(f"  {name:14s} {row[name]['median_ms']:10.2f} ms = {row[name]['ratio']:6.1f} x")
    sys.stdout.flush()


def updates_per_second() -> float:
    """Return how many state updates a second of processor time can hold: the arithmetic without memory."""
    isa = _instruction_set()
    folder = Path(__file__).resolve().parents[1] / "cpu"
    bound = compiled_library("bound.cpp", *ISA_FLAGS[isa], f"-DVLM_ISA={isa}", f"-I{folder}")
    bound.updates.argtypes, bound.updates.restype = [ctypes.c_int64], ctypes.c_float
    vectors = 1 << 18
    least = min(take_turns({"bound": lambda: bound.updates(vectors)}, 0.5)["bound"])
    return 1e3 * vectors * int(bound.width()) / least


def _instruction_set() -> str:
    return {n: name for name, n in cpu_library.LEVELS.items()}[cpu_library.level()]


def sizes(case: Case) -> dict[str, int]:
    """Return the shapes as named numbers."""
    return {name: getattr(case, name) for name in ("batch", "length", "channels", "states")}


def commit() -> str:
    """Name the revision that was timed, and whether files differed from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
        "instruction_set": _instruction_set(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
