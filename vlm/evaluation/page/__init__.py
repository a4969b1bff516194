"""A card as a page for people: one HTML file that asks for nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from vlm.errors import UsageError
from vlm.evaluation.card import DIRECTIONS, TITLES, Card
from vlm.evaluation.page import sections
from vlm.evaluation.page.markup import Markup, element, join
from vlm.evaluation.page.plots import Curve, draw_curves, draw_histogram
from vlm.evaluation.page.tasks import is_task
from vlm.evaluation.page.tasks import plots as task_plots

_GENERATOR = "vlm eval"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_TICKS = [step * 10**power for power in range(9) for step in (1, 2, 5)]


def render_page(card: Card, pictures: Mapping[str, str] | None = None) -> str:
    """Return a card as an HTML document; what the card lacks is not on it.

    Args:
        card: A card of any program of ``vlm eval``.
        pictures: Name of an item → ``data:`` URL of its picture, for the examples.
    """
    style = resources.files(__name__).joinpath("style.css").read_text(encoding="utf-8")
    name = f"{card['model'].get('name', 'scores')} on {card['protocol']['name']}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=_GENERATOR),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", name),
        element("style", Markup(style)),
    )
    parts = (
        sections.heading(card),
        sections.cautions(card),
        sections.task_results(card) if is_task(card) else sections.results(card),
        _plots(card),
        sections.examples(card, pictures or {}),
        sections.hubs(card),
        sections.comparisons(card),
        sections.description(card),
        sections.cost(card),
        element("footer", "All numbers are those of the card, a JSON file beside this page."),
    )
    body = element("body", *(part for part in parts if part is not None))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def page_path(card: Path) -> Path:
    """Return where the page of a card goes: beside it, with the ending ``.html``.

    Raises:
        UsageError: The card would be the page, or something else is there that must not be replaced.
    """
    path = card.with_suffix(".html")
    if path == card:
        raise UsageError(f"{card}: expected a name for the card, such as card.json; its page goes beside it")
    try:
        with path.open("rb") as file:
            is_page = f'name="generator" content="{_GENERATOR}'.encode() in file.read(1000)
    except FileNotFoundError:
        return path
    if not is_page:
        raise UsageError(
            f"{path}: the card's page would replace this file, which is none; choose another name"
        )
    return path


def _plots(card: Card) -> Markup | None:
    if is_task(card):
        plots = [
            _figure(
                draw_curves(plot.curves, plot.x_label, plot.y_label, plot.ticks, is_linear=True), plot.caption
            )
            for plot in task_plots(card)
        ]
    else:
        plots = [plot for plot in (_recall(card), _frames(card), _histogram(card)) if plot is not None]
    return join(element("h2", "Plots"), element("div", *plots, class_="plots")) if plots else None


def _recall(card: Card) -> Markup | None:
    curves = [
        Curve(
            f"{TITLES[direction]}, {kind}",
            curve["k"],
            curve["recall"],
            colour=place,
            is_second=direction == DIRECTIONS[1],
        )
        for direction in DIRECTIONS
        for place, (kind, curve) in enumerate(card.get("recall_curve", {}).get(direction, {}).items())
    ]
    if not curves:
        return None
    chance = {
        int(name.removeprefix("recall@")): entry["value"]
        for name, entry in card.get("chance", {}).get("query_to_item", {}).items()
        if name.startswith("recall@")
    }
    if len(chance) > 1:
        curves.append(Curve("chance, text to video", list(chance), list(chance.values()), is_reference=True))
    caption = "The share of queries with a right item among the first k."
    return _figure(draw_curves(curves, "k", "recall at k", _TICKS), caption)


def _frames(card: Card) -> Markup | None:
    section = card.get("frames_curve")
    if section is None:
        return None
    points, kind = section["points"], section["kind"]
    counts = [point["frames"] for point in points]
    name = next(name for name in points[0]["results"][DIRECTIONS[0]][kind] if name.startswith("recall@"))
    measured = {
        f"R@{name.removeprefix('recall@')}, {TITLES[direction]}": [
            point["results"][direction][kind][name] for point in points
        ]
        for direction in DIRECTIONS
    }
    if all(point["twins"] for point in points):
        measured["direction, of twins"] = [point["twins"]["direction"] for point in points]
    curves = []
    for place, (title, entries) in enumerate(measured.items()):
        value, low, high = ([entry[end] for entry in entries] for end in ("value", "low", "high"))
        curves.append(Curve(title, counts, value, low, high, colour=place))
    return _figure(
        draw_curves(curves, "different frames", f"results, {kind}", counts), f"Rule: {section['rule']}."
    )


def _histogram(card: Card) -> Markup | None:
    section = card.get("histogram")
    if section is None:
        return None
    groups = [("wrong pairs", section["negatives"]), ("right pairs", section["positives"])]
    caption = "Scores of all pairs of a query and an item; each group by itself adds up to 100 %."
    return _figure(draw_histogram(section["edges"], groups, f"{section['kind']} score"), caption)


def _figure(plot: Markup, caption: str) -> Markup:
    return element("figure", plot, element("figcaption", caption))
