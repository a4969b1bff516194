"""Measure answers about clips, a model's choices or free answers from a file; write a card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.errors import UsageError
from vlm.evaluation import Card, evaluate_answers, load_protocol
from vlm.evaluation.page.program import add_card_options, measure_and_publish
from vlm.evaluation.protocol import require_task

_EXAMPLE = (
    "vlm eval qa --protocol world --annotations DIR/manifest.jsonl --videos DIR --model demo --out card.json"
)


def main(argv: list[str]) -> int:
    """Ask every question or read the answers, print accuracy by kind, write the card."""
    arguments = _parser().parse_args(argv)
    measure = _from_predictions if arguments.predictions else _from_model
    print(measure_and_publish(arguments, lambda: (measure(arguments), {})))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlm eval qa", description=__doc__, epilog=f"example: {_EXAMPLE}")
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="a name of `vlm eval list`")
    add("--annotations", required=True, type=Path, metavar="FILE", help="questions with their answers")
    add("--videos", type=Path, metavar="DIR", help="folder of the clips")
    add("--model", metavar="SOURCE", help="a model folder, file or name; it chooses among candidates")
    add("--predictions", type=Path, metavar="FILE.json",
        help="instead of a model: a list or lines of question_id, answer, perhaps confidence; with "
        "--protocol of an open-ended benchmark its counts are compared")  # fmt: skip
    add("--answers", type=Path, metavar="FILE.json",
        help="the right answers, where --annotations hold questions only; joined by question_id")  # fmt: skip
    add("--answer-list", type=Path, metavar="FILE.json",
        help="what --predictions were chosen from, to report how much of the truth it holds")  # fmt: skip
    add_card_options(parser, videos="clips", example="frames=4")
    return parser


def _from_predictions(arguments: argparse.Namespace) -> Card:
    if arguments.model or arguments.videos or arguments.overlap or arguments.allow_missing:
        raise UsageError(
            "--predictions stands for a model and videos; it goes with neither, nor with --overlap"
        )
    if arguments.set and not arguments.protocol:
        raise UsageError("--set changes a protocol; name one: --protocol NAME")
    if arguments.answers and arguments.protocol:
        raise UsageError("--answers: a protocol finds its answers beside the questions; leave it out")
    protocol = load_protocol(arguments.protocol, tuple(arguments.set)) if arguments.protocol else None
    if protocol is not None:
        require_task(protocol, "open-ended")
    files = arguments.predictions, arguments.annotations, arguments.answer_list
    return evaluate_answers(*files, answers=arguments.answers, protocol=protocol)


def _from_model(arguments: argparse.Namespace) -> Card:
    missing = [f"--{name}" for name in ("protocol", "videos", "model") if not getattr(arguments, name)]
    if arguments.answer_list or arguments.answers:
        raise UsageError("--answers and --answer-list go with --predictions")
    if missing:
        raise UsageError(f"missing {', '.join(missing)} (or --predictions)")
    from vlm.evaluation.launch import ask_source  # needs torch, which answers in a file do not

    return ask_source(
        arguments.model,
        arguments.protocol,
        arguments.annotations,
        arguments.videos,
        overrides=tuple(arguments.set),
        device=arguments.device,
        allow_missing=arguments.allow_missing,
        overlap=arguments.overlap,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
