"""The figures of a finished check as a short table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu.session import Figures

_TIMED = ("scan", "conv", "norm", "block", "encoder")


def table(sections: Figures, ours: str) -> list[str]:
    """Return one line for each time of ours: a rival's, the ratio of both, the share of the floor."""
    lines = [f"{'':34s} {'ours ms':>9s} {'rival ms':>9s} {'ratio':>6s} {'floor':>6s}"]
    for title, row in _rows(sections):
        mine = row.get(ours, {})
        if "median_ms" not in mine:
            continue
        rivals = {name: each for name, each in row.items() if name != ours}
        name, other = next(iter(rivals.items()), ("", dict[str, Any]()))
        theirs = f"{other['median_ms']:9.3f}" if "median_ms" in other else f"{'':9s}"
        ratio = f"{other['ratio']:5.1f}x" if "ratio" in other else f"{'':6s}"
        share = f"{100 * mine['share']:4.0f} %" if "share" in mine else f"{'':6s}"
        why = other.get("error", "")[:40]
        lines.append(f"{title:34s} {mine['median_ms']:9.3f} {theirs} {ratio} {share} {name} {why}".rstrip())
    return lines


def _rows(sections: Figures) -> Iterator[tuple[str, Figures]]:
    for section in _TIMED:
        for key, jobs in sections.get(section, {}).items():
            if isinstance(jobs, dict):
                for job, row in jobs.items():
                    yield f"{section} {key} {job}", row
