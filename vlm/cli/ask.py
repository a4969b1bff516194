"""Ask a question about indexed videos and get the answer with the moment that shows it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from vlm.errors import UsageError

EXAMPLE = 'vlm ask my-index "which way does the red 3 move" --choices "left|right|up|down"'


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("index", metavar="INDEX", help="an index folder")
    parser.add_argument("question", metavar="QUESTION", help="the question, in words")
    parser.add_argument(
        "--choices", metavar="A|B|C", help="the possible answers; without, the moment is shown"
    )
    parser.add_argument("--video", metavar="ID", help="ask about this video only")
    parser.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the choices, best first, and the evidence; without choices the moment that fits the question."""
    choices = None if arguments.choices is None else [text.strip() for text in arguments.choices.split("|")]
    if choices is not None and (len(choices) < 2 or not all(choices)):
        raise UsageError(f'expected --choices "a|b", two or more answers, got {arguments.choices!r}')
    from vlm.answering import choose, find_evidence
    from vlm.cli.index import load
    from vlm.retrieval import Searcher, VideoIndex

    index = VideoIndex.open(arguments.index)
    model, _ = load(arguments.model or index.manifest.model.source)
    searcher = Searcher(index, model)
    answers: list[dict[str, str | float]] = []
    if choices is None:
        evidence = find_evidence(searcher, [arguments.question], video=arguments.video)
    else:
        result = choose(searcher, arguments.question, choices, video=arguments.video)
        evidence = result.evidence
        answers = [{"text": answer.text, "score": answer.score} for answer in result.answers]
    texts = (arguments.question, *(choices or ()))
    if unknown := dict.fromkeys(word for text in texts for word in searcher.unknown_words(text)):
        print(f"vlm: not understood: {', '.join(unknown)}", file=sys.stderr)
    if arguments.json:
        print(
            json.dumps(
                {
                    "question": arguments.question,
                    "answer": answers[0]["text"] if answers else None,
                    "choices": answers,
                    "evidence": dataclasses.asdict(evidence),
                    "model_domain": model.domain,
                },
                indent=2,
            )
        )
        return 0
    for answer in answers:
        print(f"{answer['score']:6.3f}  {answer['text']}")
    doubt = f"  [{evidence.warning}]" if evidence.warning else ""
    print(f"seen in {evidence.path} from {evidence.start_s:.1f} s to {evidence.end_s:.1f} s{doubt}")
    return 0
