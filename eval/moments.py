"""Measure how well moments are found, by a model in videos or as predictions in a file; write a card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.errors import UsageError
from vlm.evaluation import Card, render_card, write_card
from vlm.evaluation.card import write_whole
from vlm.evaluation.page import page_path, render_page

_EXAMPLE = (
    "vlm eval moments --protocol world-long --annotations DIR/moments.jsonl --videos DIR --model demo "
    "--out card.json"
)


def main(argv: list[str]) -> int:
    """Find the moments or read them, print the table, write the card."""
    arguments = _parser().parse_args(argv)
    page = page_path(arguments.out) if arguments.out else None
    card = _from_predictions(arguments) if arguments.predictions else _from_model(arguments)
    if page is not None:
        write_card(card, arguments.out)
        write_whole(render_page(card), page)
    print(json.dumps(card, indent=1, allow_nan=False) if arguments.json else render_card(card))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm eval moments", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--protocol", required=True, metavar="NAME", help="a name of `vlm eval list`")
    add("--annotations", required=True, type=Path, metavar="FILE", help="queries with their windows")
    add(
        "--videos", type=Path, metavar="DIR", help="folder of the videos; with --predictions for lengths only"
    )
    add("--model", metavar="SOURCE", help="a model folder, file or name (see: vlm models list)")
    add("--predictions", type=Path, metavar="FILE.jsonl",
        help="instead of a model: lines of qid and pred_relevant_windows, a list of [start_s, end_s, score], "
        "and perhaps pred_saliency_scores")  # fmt: skip
    add("--save-predictions", type=Path, metavar="FILE.jsonl",
        help="write what the model found there, in the form of --predictions")  # fmt: skip
    add("--device", default="auto", help="where the model runs: auto, cpu, cuda")
    add("--batch-size", type=int, default=16, metavar="N", help="stretches encoded at once")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change the protocol (the card says so), as in --set moments.proposals.stride=0.5")  # fmt: skip
    add("--allow-missing", nargs="?", type=int, const=True, default=False, metavar="N",
        help="leave unreadable videos out and list them in the card; with N: at most so many")  # fmt: skip
    add("--overlap", type=Path, metavar="FILE.json",
        help="what `vlm data overlap TRAIN TEST --out FILE.json` found of these videos in the model's "
        "training set; without it the card says: leakage unchecked")  # fmt: skip
    add("--out", type=Path, metavar="CARD.json",
        help="where to write the card, and beside it CARD.html, the same for people")  # fmt: skip
    add("--json", action="store_true", help="print the card instead of a table")
    return parser


def _from_predictions(arguments: argparse.Namespace) -> Card:
    if arguments.model or arguments.save_predictions or arguments.allow_missing or arguments.overlap:
        raise UsageError(
            "--predictions stands for a model; it goes without --model, --save-predictions, --allow-missing "
            "and --overlap"
        )
    from vlm.evaluation.moments.launch import measure_predictions

    return measure_predictions(
        arguments.predictions,
        arguments.protocol,
        arguments.annotations,
        arguments.videos,
        overrides=tuple(arguments.set),
    )


def _from_model(arguments: argparse.Namespace) -> Card:
    missing = [f"--{name}" for name in ("videos", "model") if not getattr(arguments, name)]
    if missing:
        raise UsageError(f"missing {', '.join(missing)} (or --predictions)")
    if arguments.batch_size < 1:
        raise UsageError(f"--batch-size: expected at least 1, got {arguments.batch_size}")
    from vlm.evaluation.moments.launch import search_moments  # needs torch, which --help does not

    return search_moments(
        arguments.model,
        arguments.protocol,
        arguments.annotations,
        arguments.videos,
        overrides=tuple(arguments.set),
        device=arguments.device,
        batch_size=arguments.batch_size,
        allow_missing=arguments.allow_missing,
        save=arguments.save_predictions,
        overlap=arguments.overlap,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
