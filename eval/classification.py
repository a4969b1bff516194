"""Measure a classifier, a linear probe or prompts on labelled videos, views averaged; write a card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.errors import UsageError
from vlm.evaluation import Card
from vlm.evaluation.page.program import add_card_options, measure_and_publish

_EXAMPLE = (
    "vlm eval classification --protocol k400 --annotations val.csv --videos DIR --model runs/k400/model "
    "--out card.json"
)


def main(argv: list[str]) -> int:
    """Test the model, print accuracies, write the card."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    print(measure_and_publish(arguments, lambda: (_classify(arguments), {})))
    return 0


def _classify(arguments: argparse.Namespace) -> Card:
    from vlm.evaluation.classification.launch import TrainingFiles, classify_source  # needs torch
    from vlm.evaluation.classification.runner import ScoringOptions

    train = None
    if arguments.train:
        train = TrainingFiles(annotations=arguments.train, videos=arguments.train_videos or arguments.videos)
    return classify_source(
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
    add("--batch-size", type=int, default=16, metavar="N", help="views scored at once")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode ahead")
    add("--bf16", action="store_true", help="matrix products in bf16")
    add_card_options(parser, example="clips=1")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.method == "linear-probe") != (arguments.train is not None):
        raise UsageError("--method linear-probe and --train FILE go together")
    if arguments.train_videos and not arguments.train:
        raise UsageError("--train-videos goes with --train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
