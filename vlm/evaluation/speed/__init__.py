"""Time and peak memory of a computation, what they were taken on, and a plot of how they grow with frames."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vlm.assets import asset
from vlm.errors import InvalidInput

_LEAST_RUNS, _MOST_RUNS = 3, 200
_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# the second is where glibc's own threshold ends up once large blocks were freed
_SMALLEST_PAGES, _LARGEST_HEAP = 2**16, 2**25
_GAP = 0.055  # between two labels, as a share of the panel's height


def time_ms(run: Callable[[], object], device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Return how long ``run`` takes in milliseconds; it should have run once before.

    Args:
        run: What is timed.
        device: Where it computes.
        seconds: Least time spent; at least three runs are made.

    Returns:
        For each clock ``median``, ``p20``, ``p80``, ``least`` and ``runs``. The clocks are ``wall``, and on
        a CPU ``processor``, summed over threads, which a machine's other users disturb less.
    """
    clocks: dict[str, list[float]] = {"wall": [], "processor": []}
    begin = time.perf_counter()
    while len(clocks["wall"]) < _LEAST_RUNS or (
        time.perf_counter() - begin < seconds and len(clocks["wall"]) < _MOST_RUNS
    ):
        _synchronize(device)
        start, start_processor = time.perf_counter(), time.process_time()
        run()
        _synchronize(device)
        clocks["wall"].append(1e3 * (time.perf_counter() - start))
        clocks["processor"].append(1e3 * (time.process_time() - start_processor))
    if device.type != "cpu":
        del clocks["processor"]
    return {name: _summary(times) for name, times in clocks.items()}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how much memory ``run`` needs at its peak beyond what was held before it, in bytes.

    On CUDA what PyTorch allocates. On a CPU the growth of the process's resident memory, while the C library
    gives every tensor pages of its own and takes them back at once: what the tensors need, without holes in
    the heap. None where the system does not tell (not Linux).
    """
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    if not _STATUS.exists():
        run()
        return None
    _set_malloc(_SMALLEST_PAGES)
    with suppress(OSError):  # without it the peak of what came before counts too
        _FORGET_PEAK.write_text("5")
    before = _status_bytes("VmRSS")
    run()
    peak = _status_bytes("VmHWM")
    _set_malloc(_LARGEST_HEAP)
    return max(0, peak - before)


def machine(device: torch.device) -> dict[str, Any]:
    """Name what figures are taken on: device, threads, load, versions, and the commit in a checkout."""
    checkout = asset("eval").parent
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = ""
    if (checkout / ".git").exists():
        with suppress(OSError):
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def draw_scaling(
    curves: dict[str, list[dict[str, float | None]]], path: Path, *, title: str, time_label: str
) -> None:
    """Draw time and peak memory against frames, both logarithmic, as a PNG.

    Args:
        curves: Label → points with ``frames``, ``ms`` and ``bytes``, and ``predicted_bytes`` where the memory
            is an estimate (drawn hollow); a None is left out.
        path: Where the picture goes; replaced in one move.
        title: What was measured on what.
        time_label: What the left panel shows, in seconds.

    Raises:
        InvalidInput: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidInput("the plot needs matplotlib: pip install 'videomamba-vlm[world]'") from error
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for axes, key, scale, name in ((panels[0], "ms", 1e-3, time_label), (panels[1], "bytes", 2.0**-20, "")):
        _panel(axes, curves, key, scale)
        axes.set_title(name or "peak memory beyond weights and clip, MiB", loc="left", fontsize=11)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    os.replace(temporary, path)


def _panel(axes: Any, curves: dict[str, list[dict[str, float | None]]], key: str, scale: float) -> None:
    from matplotlib.ticker import LogLocator

    frames = sorted({int(point["frames"] or 0) for points in curves.values() for point in points})
    ends: list[tuple[float, float, str, str]] = []
    for number, (label, points) in enumerate(curves.items()):
        color = f"C{number}"
        known = [(point["frames"], value * scale) for point in points if (value := point.get(key))]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, marker="o", markersize=5, linewidth=1.8)
        guessed = [
            (point["frames"], value * scale) for point in points if (value := point.get(f"predicted_{key}"))
        ]
        if guessed:
            joined = [*known[-1:], *guessed]
            axes.plot(*zip(*joined, strict=True), color=color, linewidth=1.2, linestyle=":")
            axes.plot(*zip(*guessed, strict=True), color=color, marker="o", mfc="white", linestyle="")
        if last := (guessed or known)[-1:]:
            ends.append((*last[0], label, color))  # type: ignore[arg-type]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(frames, [str(count) for count in frames])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axes.set_xlabel("frames")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _write_labels(axes, ends)


def _write_labels(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each curve right of its end, moved apart where ends lie close together."""
    to_share = axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    heights = [float(to_share.transform(axes.transData.transform(end[:2]))[1]) for end in ends]
    for _ in range(100):
        for low in range(len(ends) - 1):
            if (overlap := heights[low] + _GAP - heights[low + 1]) > 0:
                heights[low] -= overlap / 2
                heights[low + 1] += overlap / 2
    for (_, _, label, color), height in zip(ends, heights, strict=True):
        place = {"xy": (1.02, height), "xycoords": "axes fraction", "va": "center"}
        axes.annotate(label, color=color, fontsize=10, **place)


def _summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {
        "median": statistics.median(times),
        "p20": fifths[0],
        "p80": fifths[3],
        "least": min(times),
        "runs": len(times),
    }


def _set_malloc(threshold: int) -> None:
    """Let glibc serve what is larger than ``threshold`` from pages of its own; elsewhere do nothing."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mallopt(_M_MMAP_THRESHOLD, threshold)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * threshold)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
