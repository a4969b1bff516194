"""Measure multiple-choice answers about clips; write a card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.evaluation import render_card, write_card

_EXAMPLE = (
    "vlm eval qa --protocol world --annotations DIR/manifest.jsonl --videos DIR --model demo --out card.json"
)


def main(argv: list[str]) -> int:
    """Ask every question, print accuracy by kind, write the card."""
    parser = argparse.ArgumentParser(prog="vlm eval qa", description=__doc__, epilog=f"example: {_EXAMPLE}")
    add = parser.add_argument
    add("--protocol", required=True, metavar="NAME", help="a name of `vlm eval list`")
    add("--annotations", required=True, type=Path, metavar="FILE", help="the protocol's annotation file")
    add("--videos", required=True, type=Path, metavar="DIR", help="folder of the clips")
    add("--model", required=True, metavar="SOURCE", help="a model folder, file or name")
    add("--device", default="auto", help="where the model runs: auto, cpu, cuda")
    add("--allow-missing", action="store_true", help="leave unreadable clips out and list them in the card")
    add("--out", type=Path, metavar="CARD.json", help="where to write the card")
    add("--json", action="store_true", help="print the card instead of a table")
    arguments = parser.parse_args(argv)
    from vlm.evaluation.launch import ask_source  # needs torch, which --help does not

    card = ask_source(
        arguments.model,
        arguments.protocol,
        arguments.annotations,
        arguments.videos,
        device=arguments.device,
        allow_missing=arguments.allow_missing,
    )
    if arguments.out:
        write_card(card, arguments.out)
    print(json.dumps(card, indent=1, allow_nan=False) if arguments.json else render_card(card))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
