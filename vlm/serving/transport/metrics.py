"""Counters for Prometheus, in its text format; no label ever holds what a client wrote."""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
Labels = tuple[tuple[str, str], ...]
Samples = Iterable[tuple[Labels, float]]


class Metrics:
    """What happened since the start, and what is now: counters and histograms here, gauges asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[Labels, list[float]]] = defaultdict(dict)
        self._gauges: list[tuple[str, Callable[[], Samples]]] = []
        self._started = time.time()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name][tuple(labels.items())] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            row = self._histograms[name].setdefault(
                tuple(labels.items()), [0.0] * (len(_BUCKETS_S) + 2)
            )  # one count a bucket, then those above all, then the sum
            row[bisect.bisect_left(_BUCKETS_S, seconds)] += 1
            row[-1] += seconds

    def gauge(self, name: str, read: Callable[[], Samples]) -> None:
        """Have `read` called whenever the metrics are asked for."""
        self._gauges.append((name, read))

    def render(self) -> str:
        """Return everything in Prometheus's text format."""
        lines: list[str] = []
        with self._lock:
            for name, values in sorted(self._counters.items()):
                lines.append(f"# TYPE {name} counter")
                lines += [_line(name, labels, value) for labels, value in values.items()]
            for name, rows in sorted(self._histograms.items()):
                lines.append(f"# TYPE {name} histogram")
                for labels, row in rows.items():
                    lines += _histogram(name, labels, row)
        for name, read in [*self._gauges, *_process(self._started)]:
            lines.append(f"# TYPE {name} gauge")
            lines += [_line(name, labels, value) for labels, value in read()]
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, row: list[float]) -> list[str]:
    lines, total = [], 0.0
    for limit, count in zip((*map(str, _BUCKETS_S), "+Inf"), row[:-1], strict=True):
        total += count
        lines.append(_line(f"{name}_bucket", (*labels, ("le", limit)), total))
    return [*lines, _line(f"{name}_sum", labels, row[-1]), _line(f"{name}_count", labels, total)]


def _line(name: str, labels: Labels, value: float) -> str:
    text = ",".join(f'{key}="{_escaped(word)}"' for key, word in labels)
    return f"{name}{{{text}}} {value:.10g}" if text else f"{name} {value:.10g}"


def _escaped(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _process(started: float) -> list[tuple[str, Callable[[], Samples]]]:
    values = {"process_start_time_seconds": started}
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as stream:
        pages = int(stream.read().split()[1])
        values["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        values["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return [(name, lambda value=value: [((), value)]) for name, value in values.items()]  # type: ignore[misc]
