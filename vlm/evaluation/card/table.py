"""A card as lines of text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm.evaluation.card import DIRECTIONS, TITLES, Card
from vlm.evaluation.card.warnings import leakage_line, warnings

_METHODS = {
    "classifier": "classification",
    "linear-probe": "linear probe on frozen features",
    "zero-shot": "zero-shot by prompts",
}


def render_card(card: Card) -> str:
    """Return the card's figures as a table: results, twins, controls, ceilings, chance, and what to note."""
    protocol, model = card["protocol"], card["model"]
    if "multiple_choice" in card["results"]:
        return _render_choices(card)
    if "answers" in card["results"]:
        return _render_answers(card)
    if "classification" in card["results"]:
        return _render_classes(card)
    if "moments" in card["results"]:
        return _render_moments(card)
    lines = [
        f"protocol {protocol['name']} v{protocol['version']}: {protocol['num_queries']} queries, "
        f"{protocol['num_items']} items; model {model.get('name', 'scores')}",
        "",
    ]
    rows = list(_rows(card))
    columns = list(dict.fromkeys(name for _, block in rows for name in block))
    header = ["", *columns]
    cells = [[title, *(cell(name, block.get(name)) for name in columns)] for title, block in rows]
    lines += _aligned([header, *cells])
    twins = list(_twin_rows(card))
    if twins:
        columns = list(dict.fromkeys(name for _, block in twins for name in block))
        body = [[title, *(cell(name, block.get(name)) for name in columns)] for title, block in twins]
        lines += ["", "clips and their reversed twins", *_aligned([["", *columns], *body])]
    if card.get("minimal_pairs"):
        lines += ["", "minimal pairs: the right caption above one that differs in one thing; guessing 50.0"]
        lines += _aligned(list(_pair_rows(card["minimal_pairs"])))
    lines += ["", *_notes(card)] if any(_notes(card)) else []
    return "\n".join(lines)


def _pair_rows(pairs: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["", *pairs, "pairs"]
    for kind, block in next(iter(pairs.values())).items():
        cells = [cell("accuracy", table[kind]["accuracy"]) for table in pairs.values()]
        yield [kind, *cells, str(block["num_pairs"])]


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """Return paired differences as a table."""
    a, b = (model.get("name", "scores") for model in comparison["models"])
    lines = [f"difference {b} - {a}, same queries, 95 % intervals", ""]
    rows = [["", "measure", a, b, "difference", "interval"]]
    for direction, kinds in comparison["differences"].items():
        for kind, block in kinds.items():
            for name, entry in block.items():
                scale = 1.0 if name.endswith("rank") else 100.0
                first, second, value, low, high = (
                    scale * entry[key] for key in ("first", "second", "value", "low", "high")
                )
                title = f"{TITLES[direction]}, {kind}"
                rows.append(
                    [
                        title,
                        name,
                        f"{first:.1f}",
                        f"{second:.1f}",
                        f"{value:+.1f}",
                        f"[{low:+.1f}, {high:+.1f}]",
                    ]
                )
    notes = [
        f"{name}: {leakage_line(section)}"
        for name, section in zip((a, b), comparison["leakage"], strict=True)
        if section
    ]
    return "\n".join([*lines, *_aligned(rows), *([""] if notes else []), *notes])


def _render_choices(card: Card) -> str:
    protocol, model = card["protocol"], card["model"]
    rows = [["", "accuracy", "guessing", "questions"]]
    for kind, block in card["results"]["multiple_choice"].items():
        accuracy, chance = cell("accuracy", block["accuracy"]), cell("chance", block["chance"])
        rows.append([kind, accuracy, chance, str(block["num_questions"])])
    for name, block in card["results"].get("multiple_choice_parts", {}).items():
        accuracy, chance = cell("accuracy", block["accuracy"]), cell("chance", block["chance"])
        rows.append([f"all, {name} alone", accuracy, chance, str(block["num_questions"])])
    head = (
        f"protocol {protocol['name']} v{protocol['version']}, multiple choice: {protocol['num_questions']} "
        f"questions, {protocol['num_items']} clips; model {model['name']}"
    )
    return "\n".join([head, "", *_aligned(rows), *_confidence_lines(card), *_notes(card)])


def _render_answers(card: Card) -> str:
    protocol, kinds = card["protocol"], card["results"]["answers"]
    columns = list(next(iter(kinds.values())))
    rows = [
        [kind, *(str(entry) if isinstance(entry, int) else cell("", entry) for entry in block.values())]
        for kind, block in kinds.items()
    ]
    head = (
        f"protocol {protocol['name']} v{protocol['version']}, exact match: {protocol['num_questions']} "
        f"questions, {protocol['num_items']} clips; model {card['model']['name']}"
    )
    titles = [column.replace("_", " ").removeprefix("num ") for column in columns]
    return "\n".join([head, "", *_aligned([["", *titles], *rows]), *_confidence_lines(card), *_notes(card)])


def _confidence_lines(card: Card) -> list[str]:
    lines = []
    if "calibration" in card:
        error, chance = (100 * card["calibration"][name]["value"] for name in ("ece", "ece_if_calibrated"))
        lines.append(f"calibration error {error:.1f}, {chance:.1f} if every confidence were true")
    if "abstention" in card:
        area, flat, best = (
            100 * card["abstention"][name]["value"] for name in ("aurc", "aurc_unordered", "aurc_best")
        )
        lines.append(f"wrong among the surest (AURC): {area:.1f}; at random {flat:.1f}, at best {best:.1f}")
    return ["", *lines] if lines else []


def _render_classes(card: Card) -> str:
    protocol, model, results = card["protocol"], card["model"], card["results"]
    columns = list(results["classification"])
    blocks = {
        f"{protocol['views']} views": results["classification"],
        "one view": results["single_view"],
        "guessing": card["chance"],
    }
    if protocol["views"] == 1:
        del blocks["1 views"]
    rows = [[row, *(cell(name, block.get(name)) for name in columns)] for row, block in blocks.items()]
    title = _METHODS[protocol.get("method", "classifier")]
    head = (
        f"protocol {protocol['name']} v{protocol['version']}, {title}: {protocol['num_items']} videos "
        f"of {protocol['num_classes']} classes, {protocol['frames']} frames, {protocol['clips']} clips x "
        f"{protocol['crops']} crops; model {model['name']}"
    )
    mistakes = [
        f"taken for another: {row['class']} for {row['taken_for']}, {row['num_videos']} videos"
        for row in card["confusions"][:3]
    ]
    return "\n".join([head, "", *_aligned([["", *columns], *rows]), "", *mistakes, *_notes(card)]).rstrip()


def _render_moments(card: Card) -> str:
    protocol, results, baselines = card["protocol"], card["results"], card["baselines"]
    columns = {**results["moments"], **baselines["moments"]}
    kind = next(iter(results["moments"]))
    head = (
        f"protocol {protocol['name']} v{protocol['version']}, moments: {protocol['num_queries']} queries, "
        f"{protocol['num_items']} videos; model {card['model']['name']}"
    )
    rows = [["", *columns]]
    rows += [[name, *(cell(name, block[name]) for block in columns.values())] for name in columns[kind]]
    shown = [f"recall@1@{protocol['ious'][len(protocol['ious']) // 2]:g}", "miou", "map"]
    lengths = [["true windows", *shown, "queries"]]
    for name, block in card["lengths"][kind].items():
        lengths.append([name, *(cell(key, block.get(key)) for key in shown), str(block["num_queries"])])
    lines = [head, "", *_aligned(rows), "", *_aligned(lengths)]
    highlights = {**results.get("highlights", {}), **baselines["highlights"]}
    if "highlights" in results:
        table = [["highlights", *(f"{name}, {key}" for name in highlights for key in ("map", "hit@1"))]]
        for name in highlights[kind]:
            cells = [cell(key, block[name][key]) for block in highlights.values() for key in ("map", "hit@1")]
            table.append([name, *cells])
        lines += ["", *_aligned(table)]
    if not baselines["moments"]:
        lines += ["", "no baselines: the annotations do not say how long the videos are; --videos DIR does"]
    return "\n".join([*lines, *(["", *_notes(card)] if _notes(card) else [])])


def _rows(card: Card) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for direction in DIRECTIONS:
        for kind, block in card["results"].get(direction, {}).items():
            yield f"{TITLES[direction]}, {kind}", block
    for direction in DIRECTIONS:
        for kind, block in card.get("duplicates", {}).get("results", {}).get(direction, {}).items():
            yield f"{TITLES[direction]}, {kind}, equal captions joined", block
    for name, control in card.get("controls", {}).items():
        for kind, block in control["results"].get("query_to_item", {}).items():
            yield f"control {name}, {kind}", block
    for name, block in card.get("ceilings", {}).items():
        yield f"oracle {name}", block["query_to_item"]
    for direction, block in card.get("chance", {}).items():
        yield f"chance, {TITLES[direction]}", block


def _twin_rows(card: Card) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind, block in card.get("twins", {}).items():
        yield kind, block
    for name, control in card.get("controls", {}).items():
        for kind, block in control.get("twins", {}).items():
            yield f"control {name}, {kind}", block


def _notes(card: Card) -> list[str]:
    return [*warnings(card), *(f"published: {line}" for line in card.get("published", []))]


def cell(name: str, entry: Mapping[str, float] | None) -> str:
    """Return a measure as tables show it: ranks as they are, all else in percent, intervals in brackets."""
    if entry is None:
        return "-"
    scale = 1.0 if name.endswith("rank") else 100.0
    text = f"{scale * entry['value']:.1f}"
    if "low" in entry:
        text += f" [{scale * entry['low']:.1f}, {scale * entry['high']:.1f}]"
    return text


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
