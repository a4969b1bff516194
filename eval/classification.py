"""Measure a classifier, a linear probe or prompts on labelled videos, views averaged; write a card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.errors import UsageError
from vlm.evaluation import render_card, write_card
from vlm.evaluation.card import write_whole
from vlm.evaluation.page import page_path, render_page

_EXAMPLE = (
    "vlm eval classification --protocol k400 --annotations val.csv --videos DIR --model runs/k400/model "
    "--out card.json"
)


def main(argv: list[str]) -> int:
    """Test the model, print accuracies, write the card."""
    arguments = _parser().parse_args(argv)
    page = page_path(arguments.out) if arguments.out else None
    _check(arguments)
    from vlm.evaluation.classification.launch import TrainingFiles, classify_source  # needs torch
    from vlm.evaluation.classification.runner import ScoringOptions

    train = None
    if arguments.train:
        train = TrainingFiles(annotations=arguments.train, videos=arguments.train_videos or arguments.videos)
    card = classify_source(
        arguments.model,
        arguments.protocol,
        arguments.annotations,
        arguments.videos,
        method=arguments.method,
        train=train,
        classes=arguments.classes,
        overrides=tuple(arguments.set),
        device=arguments.device,
        options=ScoringOptions(
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            allow_missing=arguments.allow_missing,
            autocast=arguments.bf16,
        ),
        overlap=arguments.overlap,
    )
    if page is not None:
        write_card(card, arguments.out)
        write_whole(render_page(card), page)
    print(json.dumps(card, indent=1, allow_nan=False) if arguments.json else render_card(card))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm eval classification", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--protocol", required=True, metavar="NAME", help="a name of `vlm eval list`")
    add("--annotations", required=True, type=Path, metavar="FILE", help="labels of the videos")
    add("--videos", required=True, type=Path, metavar="DIR", help="folder of the videos")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, if the model does not say them")
    add("--model", required=True, metavar="SOURCE", help="a model folder, file or name")
    add("--method", default="classifier", choices=("classifier", "linear-probe", "zero-shot"),
        help="the model's own head, one trained here on its frozen features, or prompts with the classes' "
        "names")  # fmt: skip
    add("--train", type=Path, metavar="FILE", help="labels to train --method linear-probe with")
    add("--train-videos", type=Path, metavar="DIR", help="folder of their videos; --videos by default")
    add("--device", default="auto", help="where the model runs: auto, cpu, cuda")
    add("--batch-size", type=int, default=16, metavar="N", help="views scored at once")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode ahead")
    add("--bf16", action="store_true", help="matrix products in bf16")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change the protocol (the card says so), as in --set clips=1")  # fmt: skip
    add("--allow-missing", action="store_true", help="leave unreadable videos out and list them in the card")
    add("--overlap", type=Path, metavar="FILE.json",
        help="what `vlm data overlap TRAIN TEST --out FILE.json` found of these videos in the model's "
        "training set; without it the card says: leakage unchecked")  # fmt: skip
    add("--out", type=Path, metavar="CARD.json",
        help="where to write the card, and beside it CARD.html, the same for people")  # fmt: skip
    add("--json", action="store_true", help="print the card instead of a table")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.method == "linear-probe") != (arguments.train is not None):
        raise UsageError("--method linear-probe and --train FILE go together")
    if arguments.train_videos and not arguments.train:
        raise UsageError("--train-videos goes with --train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
