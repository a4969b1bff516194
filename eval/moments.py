"""Measure how well moments are found, by a model in videos or as predictions in a file; write a card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.errors import UsageError
from vlm.evaluation import Card
from vlm.evaluation.page.program import add_card_options, measure_and_publish

_EXAMPLE = (
    "vlm eval moments --protocol world-long --annotations DIR/moments.jsonl --videos DIR --model demo "
    "--out card.json"
)


def main(argv: list[str]) -> int:
    """Find the moments or read them, print the table, write the card."""
    arguments = _parser().parse_args(argv)
    measure = _from_predictions if arguments.predictions else _from_model
    print(measure_and_publish(arguments, lambda: (measure(arguments), {})))
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
    add("--batch-size", type=int, default=16, metavar="N", help="stretches encoded at once")
    add_card_options(parser, example="moments.proposals.stride=0.5")
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
