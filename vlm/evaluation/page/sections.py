"""The parts of a page, each from its part of a card; a part that the card lacks is None."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm.evaluation.card import DIRECTIONS, TITLES, Card
from vlm.evaluation.card.warnings import leakage_line, warnings
from vlm.evaluation.page import tasks
from vlm.evaluation.page.markup import Content, Markup, element, join, number, table

_RANKS = ("median_rank", "mean_rank")
_SHORT = {
    "median_rank": "median rank",
    "mean_rank": "mean rank",
    "ndcg@10": "nDCG@10",
    "map": "mAP",
    "pair_recall@1": "R@1 of the pair",
    "direction|pair": "direction, given the pair",
}
_HASHES = ("sha256", "fingerprint")


def heading(card: Card) -> Markup:
    """Return the title, what was measured in one line, and the measures it is quoted by as large figures."""
    protocol, model = card["protocol"], card["model"]
    tiles = [
        element(
            "div",
            element("small", f"R@1, {TITLES[direction]}, {kind}"),
            figure(block["recall@1"], "recall@1"),
            class_="tile",
        )
        for direction in DIRECTIONS
        for kind, block in card["results"].get(direction, {}).items()
        if "recall@1" in block and kind not in card.get("kinds", {})  # corrections are in the table
    ]
    if tasks.is_task(card):
        title, entry = tasks.headline(card)
        tiles = [element("div", element("small", title), figure(entry, title), class_="tile")]
    hashes = {
        "model": model.get("fingerprint"),
        "scores": model.get("scores_sha256"),
        "predictions": model.get("predictions_sha256"),
        "annotations": protocol.get("annotations_sha256"),
        "positives": protocol.get("positives_sha256"),
        "gallery": protocol.get("gallery_sha256"),
    }
    short = [join(f"{name} ", element("code", value[:12])) for name, value in hashes.items() if value]
    counted = {"queries": "num_queries", "questions": "num_questions", "classes": "num_classes"}
    counts = [f"{protocol[key]:,} {name}" for name, key in counted.items() if key in protocol]
    facts: list[Content] = [", ".join((*counts, f"{protocol['num_items']:,} items"))]
    if "frames" in protocol:
        facts.append(f"{protocol['frames']} frames")
    parts = [join(" · ", part) for part in (*facts[1:], *short)]
    return join(
        element("h1", f"{model.get('name', 'scores')} on {protocol['name']} v{protocol['version']}"),
        element("p", facts[0], *parts, class_="faint"),
        element("div", *tiles, class_="tiles"),
        element("p", "Fractions in percent, with 95 % intervals.", class_="faint"),
    )


def figure(entry: Mapping[str, float] | None, name: str) -> Markup:
    """Return a measure with its interval below, as the card's table rounds it."""
    if entry is None:
        return element("span", "–", class_="faint")
    scale = 1.0 if name in _RANKS else 100.0
    main = number(entry["value"], f"{scale * entry['value']:.1f}")
    if "low" not in entry:
        return main
    ends = [number(entry[end], f"{scale * entry[end]:.1f}") for end in ("low", "high")]
    return join(main, element("small", ends[0], " to ", ends[1]))


def cautions(card: Card) -> Markup | None:
    """Return the card's warnings as a list."""
    found = warnings(card)
    return element("ul", *(element("li", line) for line in found), class_="warnings") if found else None


def results(card: Card) -> Markup:
    """Return the table of both directions and all kinds of score, above what chance reaches."""
    rows = {
        f"{TITLES[direction]}, {kind}": block
        for direction in DIRECTIONS
        for kind, block in card["results"].get(direction, {}).items()
    }
    for direction, block in card.get("chance", {}).items():
        if direction in card["results"]:
            rows[f"chance, {TITLES[direction]}"] = block
    return join(element("h2", "Results"), _measures(rows), *_published(card))


def task_results(card: Card) -> Markup:
    """Return the tables of a card of answers, classes or moments; the first one stands open."""
    parts = [element("h2", "Results")]
    for title, rows in tasks.tables(card):
        grid = _measures(rows)
        parts.append(element("details", element("summary", title), grid) if title else grid)
    return join(*parts, *_published(card))


def comparisons(card: Card) -> Markup | None:
    """Return what else was measured on the same queries: twins, minimal pairs, controls, ceilings, tiers."""
    twins = dict(card.get("twins", {}))
    controls, ceilings = {}, {}
    for name, control in card.get("controls", {}).items():
        twins |= {f"control {name}, {kind}": block for kind, block in control.get("twins", {}).items()}
        for kind, block in control["results"].get("query_to_item", {}).items():
            controls[f"control {name}, {kind}"] = block
    for name, block in card.get("ceilings", {}).items():
        ceilings[f"oracle {name}"] = block["query_to_item"]
    if twins and card.get("twin_chance"):
        twins["chance"] = card["twin_chance"]
    joined = {
        f"{TITLES[direction]}, {kind}": block
        for direction, kinds in card.get("duplicates", {}).get("results", {}).items()
        for kind, block in kinds.items()
    }
    tiers = {
        f"{name} ({next(iter(kinds.values()))['num_queries']})": {k: e["recall@1"] for k, e in kinds.items()}
        for name, kinds in card.get("tiers", {}).items()
    }
    pairs: dict[str, Any] = {}
    for kind, block in card.get("minimal_pairs", {}).items():
        for name, entry in block.items():
            pairs.setdefault(f"{name} ({entry['num_pairs']})", {})[kind] = entry["accuracy"]
    blocks = (
        ("Clips and their reversed twins", twins),
        ("The right caption above one that differs in one thing (guessing 50)", pairs),
        ("Equal captions sharing their items", joined),
        ("Controls, text to video", controls),
        ("What a part of the truth reaches, text to video", ceilings),
        ("R@1 by kind of query", tiers),
    )
    found = [
        element("details", element("summary", title), _measures(rows), open="open" if rows is twins else None)
        for title, rows in blocks
        if rows
    ]
    return join(element("h2", "Beside it"), *found) if found else None


def hubs(card: Card) -> Markup | None:
    """Return how unevenly the first places fall on the items."""
    section = card.get("hubness")
    if section is None:
        return None
    skewness = section["skewness"]
    words: list[Content] = [
        f"How often each item is among the first {section['k']} of a query: ",
        number(section["expected"], f"{section['expected']:.1f}"),
        " times if all were alike; ",
        number(section["num_never"], f"{section['num_never']}"),
        " items never are. Skewness ",
        "undefined, all are alike" if skewness is None else number(skewness, f"{skewness:.2f}"),
        " (0 if even; above 1 a few items take the places of others).",
    ]
    rows: list[list[Content]] = [
        [_named(entry), number(entry["occurrences"], f"{entry['occurrences']:g}")]
        for entry in section["most_frequent"]
    ]
    return join(
        element("h2", "Hubs"),
        element("p", *words),
        element("div", table(["most frequent", f"times, {section['kind']}"], rows), class_="narrow"),
    )


def examples(card: Card, pictures: Mapping[str, str]) -> Markup | None:
    """Return the queries whose right item stands lowest and highest.

    Args:
        card: The card.
        pictures: Item's name → source of its picture.
    """
    section = card.get("examples")
    if section is None or not section["worst"]:
        return None
    order = "By the rank of the right item; of equal ranks, by how far it is above the best wrong one."
    parts = [element("p", order, class_="faint")]
    for title, name in (("Worst", "worst"), ("Best", "best")):
        boxes = (_example(entry, pictures) for entry in section[name])
        parts += [
            element("h3", f"{title} queries, {section['kind']}"),
            element("div", *boxes, class_="examples"),
        ]
    return join(element("h2", "Examples"), *parts)


def _example(entry: Mapping[str, Any], pictures: Mapping[str, str]) -> Markup:
    rank, right, first = entry["rank"], entry["right"], entry["first"]
    is_first = right["item"] == first["item"]
    shown = [("right, and first" if is_first else "right", right, "right")]
    if not is_first:
        # another right item may stand first: then the rank is 1
        shown.append(("first", first, "wrong" if rank > 1 else "right"))
    caption = entry.get("caption", f"query {entry['query']}")
    return element(
        "div",
        element("p", caption, class_="caption"),
        element("p", "right item at rank ", number(rank, f"{rank:g}"), class_="faint"),
        *(_shown(title, item, kind, pictures) for title, item, kind in shown),
        class_="example",
    )


def _shown(title: str, item: Mapping[str, Any], kind: str, pictures: Mapping[str, str]) -> Markup:
    source = pictures.get(item.get("name", ""))
    words = join(f"{title}: {_named(item)}, score ", number(item["score"], f"{item['score']:.3f}"))
    picture = element("img", src=source, alt=f"frames of {_named(item)}") if source else Markup()
    return element("div", words, picture, class_=f"shown {kind}")


def description(card: Card) -> Markup:
    """Return what was measured: protocol, model, data, leakage, with all hashes."""
    parts = [element("h2", "What was measured")]
    for title, name in (("Protocol", "protocol"), ("Model", "model"), ("Data", "data")):
        if card.get(name):
            parts += [element("h3", title), element("dl", *_pairs(card[name]))]
    if "leakage" in card:
        section = {
            key: value for key, value in card["leakage"].items() if key in ("training_set", "overlap_sha256")
        }
        line = element("p", leakage_line(card["leakage"]))
        parts += [element("h3", "Leakage"), line, element("dl", *_pairs(section))]
    return join(*parts)


def cost(card: Card) -> Markup:
    """Return times per query and per video, and the machine."""
    parts = [element("h2", "Time and machine")]
    times = card.get("cost", {})
    each = {
        "a query": "encode_ms_per_query",
        "a video": "encode_ms_per_video",
        "a pair": "matching_ms_per_pair",
    }
    boxes = [
        element(
            "div", element("small", f"ms {title}"), number(times[name], f"{times[name]:.3g}"), class_="tile"
        )
        for title, name in each.items()
        if name in times
    ]
    if boxes:
        parts.append(element("div", *boxes, class_="tiles"))
    if times:
        parts.append(element("dl", *_pairs(times)))
    return join(*parts, element("dl", *_pairs(card["environment"])))


def _published(card: Card) -> list[Markup]:
    lines = [element("li", line) for line in card.get("published", [])]
    return [element("h3", "Published by others"), element("ul", *lines)] if lines else []


def _measures(rows: Mapping[str, Mapping[str, Any]]) -> Markup:
    columns = list(dict.fromkeys(name for block in rows.values() for name in block))
    heads = [_SHORT.get(name, name.replace("recall@", "R@")) for name in columns]
    return table(
        ["", *heads],
        [[title, *(figure(block.get(name), name) for name in columns)] for title, block in rows.items()],
    )


def _pairs(section: Mapping[str, Any], prefix: str = "") -> Iterator[Markup]:
    """Return terms and values of a section, nested ones with their path."""
    for name, value in section.items():
        title = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{title}, ")
        elif value not in (None, "", [], ()):
            shown: Content = str(value)
            if isinstance(value, list):
                shown = ", ".join(map(str, value[:20])) + (f", … ({len(value)})" if len(value) > 20 else "")
            elif isinstance(value, float):
                shown = number(value, f"{value:.4g}")
            yield element("dt", title)
            yield element("dd", element("code", shown) if _is_hash(name) else shown)


def _is_hash(name: str) -> bool:
    return name.endswith(_HASHES)


def _named(item: Mapping[str, Any]) -> str:
    return str(item.get("name", f"item {item['item']}"))
