"""What every program of ``vlm eval`` that makes a card takes, and what it gives: a table, a card, a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from vlm.evaluation.card import Card, write_card, write_whole
from vlm.evaluation.card.table import render_card
from vlm.evaluation.page import page_path, render_page

Measured = tuple[Card, Mapping[str, str]]


def add_card_options(parser: argparse.ArgumentParser, *, videos: str = "videos", example: str = "") -> None:
    """Add where the model runs, changes to the protocol, missing videos, leakage, and where the card goes.

    Args:
        parser: Of the program.
        videos: What the program calls a video.
        example: A change to the protocol that makes sense there.
    """
    add = parser.add_argument
    as_in = f", as in --set {example}" if example else ""
    add("--device", default="auto", help="where the model runs: auto, cpu, cuda")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help=f"change the protocol (the card says so){as_in}")  # fmt: skip
    add("--allow-missing", nargs="?", type=int, const=True, default=False, metavar="N",
        help=f"leave unreadable {videos} out and list them in the card; with N: at most so many")  # fmt: skip
    add("--overlap", type=Path, metavar="FILE.json",
        help=f"what `vlm data overlap TRAIN TEST --out FILE.json` found of these {videos} in the model's "
        "training set; without it the card says: leakage unchecked")  # fmt: skip
    add("--out", type=Path, metavar="CARD.json",
        help="where to write the card, and beside it CARD.html, the same for people")  # fmt: skip
    add("--json", action="store_true", help="print the card instead of a table")


def measure_and_publish(arguments: argparse.Namespace, measure: Callable[[], Measured]) -> str:
    """Measure, write the card and its page, and return what to print: the table, or the card as JSON.

    Args:
        arguments: Parsed, with those of `add_card_options`.
        measure: Gives the card, and a picture of each item that its examples name.

    Raises:
        UsageError: The page would replace a file that is none; raised before anything is measured.
    """
    page = page_path(arguments.out) if arguments.out else None
    card, pictures = measure()
    if page is not None:
        write_card(card, arguments.out)
        write_whole(render_page(card, pictures), page)
    return json.dumps(card, indent=1, allow_nan=False) if arguments.json else render_card(card)
