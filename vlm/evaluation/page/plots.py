"""Plots as inline SVG, whose colours follow the page's; every point carries its exact values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.evaluation.page.markup import Markup, element, join

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 10, 38
# about how wide a character of a label is
_CHARACTER = 6.5


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a line.

    Attributes:
        name: For the legend.
        x: (points,) ascending.
        y: (points,) fractions.
        low: (points,) lower ends of the intervals; empty without intervals.
        high: (points,) upper ends.
        colour: Number of its colour, 0 to 3, then the same again.
        is_second: Drawn broken, beside another of its colour.
        is_reference: Drawn faint and without points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int = 0
    is_second: bool = False
    is_reference: bool = False


def draw_curves(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    ticks: Sequence[float],
    *,
    is_linear: bool = False,
) -> Markup:
    """Return a legend and a plot of fractions, in percent, over a logarithmic axis or a linear one.

    Args:
        curves: At least one.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        ticks: Where the horizontal axis is marked.
        is_linear: The horizontal axis is; of a logarithmic one every x must be above 0.
    """
    first = min(min(curve.x) for curve in curves)
    last = max(max(curve.x) for curve in curves)

    def place_of(x: float) -> float:
        return x - first if is_linear else math.log(x / first)

    span = place_of(last) or 1.0

    def across(x: float) -> float:
        return _LEFT + place_of(x) / span * (_WIDTH - _LEFT - _RIGHT - 6)

    marks = [(across(tick), f"{tick:g}") for tick in ticks if first <= tick <= last]
    parts = [_frame(x_label, y_label, marks)]
    for place, curve in enumerate(curves):
        style = _style(curve)
        shift = 2.5 * (place - (len(curves) - 1) / 2) if curve.low else 0.0  # intervals beside one another
        points = [(across(x) + shift, _up(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(element("polyline", points=line, class_=f"curve {style}"))
        if curve.is_reference:
            continue
        for (x, _), low, high in zip(points, curve.low, curve.high, strict=False):
            parts.append(_line(x, _up(low), x, _up(high), f"curve whisker {style}"))
        parts += [
            element(
                "circle",
                element("title", f"{curve.name}: {100 * value:.1f} % at {at:g}"),
                cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_=f"point {style}",
                data_x=repr(float(at)), data_y=repr(float(value)),
            )
            for (x, y), at, value in zip(points, curve.x, curve.y, strict=True)
        ]  # fmt: skip
    names = [(_style(curve), curve.name) for curve in curves]
    return _figure(parts, names, f"{y_label} against {x_label}")


def draw_histogram(
    edges: Sequence[float], groups: Sequence[tuple[str, Sequence[int]]], x_label: str
) -> Markup:
    """Return a legend and a plot of the share of each group's counts in each bin, heights scaled alike.

    Args:
        edges: (bins + 1,) ascending.
        groups: Name and (bins,) counts of each.
        x_label: Of the horizontal axis.
    """
    shares = [[count / max(1, sum(counts)) for count in counts] for _, counts in groups]
    highest = max(max(share) for share in shares) or 1.0
    step = (_WIDTH - _LEFT - _RIGHT) / (len(edges) - 1)
    low, high = edges[0], edges[-1]
    marks = [low + (high - low) * part / 4 for part in range(5)]
    ticks = [(_LEFT + (_WIDTH - _LEFT - _RIGHT) * part / 4, f"{mark:.2g}") for part, mark in enumerate(marks)]
    parts = [_frame(x_label, "share of the pairs", ticks, f"{100 * highest:.3g} %")]
    for place, ((name, counts), share) in enumerate(zip(groups, shares, strict=True)):
        for bin_, (count, height) in enumerate(zip(counts, share, strict=True)):
            top = _up(height / highest)
            caption = f"{name}: {count} pairs from {edges[bin_]:.3g} to {edges[bin_ + 1]:.3g}"
            parts.append(
                element(
                    "rect",
                    element("title", caption),
                    x=f"{_LEFT + bin_ * step:.2f}", y=f"{top:.2f}", width=f"{step:.2f}",
                    height=f"{_HEIGHT - _BOTTOM - top:.2f}", class_=f"bar s{place}",
                    data_bin=bin_, data_count=count,
                )
            )  # fmt: skip
    names = [(f"s{place}", f"{name} ({sum(counts):,})") for place, (name, counts) in enumerate(groups)]
    return _figure(parts, names, f"histogram of {x_label}")


def _figure(parts: Sequence[Markup], names: Sequence[tuple[str, str]], title: str) -> Markup:
    keys = (element("span", element("i", class_=f"key {kind}"), name) for kind, name in names)
    drawing = element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    return join(element("p", *keys, class_="legend"), drawing)


def _frame(x_label: str, y_label: str, ticks: Sequence[tuple[float, str]], top: str = "100 %") -> Markup:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(_LEFT, _up(share), _WIDTH - _RIGHT, _up(share), "grid"))
    scale = float(top.removesuffix(" %"))
    for share in (0.0, 0.5, 1.0):
        label = f"{scale * share:.{3 if scale == 100 else 2}g}"
        parts.append(element("text", label, x=_LEFT - 5, y=f"{_up(share) + 4:.1f}", text_anchor="end"))
    for x, label, anchor in _labels(ticks):
        parts.append(element("text", label, x=f"{x:.1f}", y=_HEIGHT - _BOTTOM + 15, text_anchor=anchor))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(element("text", x_label, x=middle, y=_HEIGHT - 5, text_anchor="middle"))
    centre = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f"rotate(-90 10 {centre:g})"
    parts.append(element("text", f"{y_label}, %", x=10, y=centre, text_anchor="middle", transform=turned))
    return join(*parts)


def _labels(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str, str]]:
    """Return place, text and anchor of the last tick, and of those whose texts are clear of the next."""
    found: list[tuple[float, str, str]] = []
    free_until = math.inf
    for x, label in reversed(ticks):
        width = _CHARACTER * len(label)
        anchor, right = ("middle", x + width / 2) if found else ("end", x)
        if right + _CHARACTER <= free_until:
            found.append((x, label, anchor))
            free_until = right - width
    return found[::-1]


def _style(curve: Curve) -> str:
    if curve.is_reference:
        return "reference"
    return f"s{curve.colour % 4}" + (" second" if curve.is_second else "")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _up(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
