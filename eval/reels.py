"""Measure what a model knows of reels of the digit world: who was there, and who came first."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

_EXAMPLE = "vlm eval reels --model runs/long/model --split test --seed 1 --count 100 --out card.json"


def main(argv: list[str]) -> int:
    """Render the reels in memory, judge every claim, print accuracy by kind, write the card."""
    parser = argparse.ArgumentParser(
        prog="vlm eval reels", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--model", required=True, metavar="SOURCE", help="a model folder, file or name, with a matching head")
    add("--split", choices=("val", "test"), default="test", help="whose writers' digits are shown")
    add("--seed", type=int, default=1, help="which reels")
    add("--count", type=int, default=100, help="groups of four reels: two, and their mirrors")
    add("--device", default="auto", help="where the model runs: auto, cpu, cuda")
    add("--out", type=Path, metavar="CARD.json", help="where to write the card")
    add("--json", action="store_true", help="print the card instead of a table")
    arguments = parser.parse_args(argv)
    from vlm.errors import UsageError
    from vlm.evaluation.card import write_card
    from vlm.evaluation.pairs.reels import measure_reels, table
    from vlm.models.weights import load_model

    if arguments.seed < 0 or arguments.count < 1:
        got = f"{arguments.seed} and {arguments.count}"
        raise UsageError(f"--seed must be at least 0 and --count at least 1, got {got}")
    model = load_model(arguments.model, device=arguments.device)
    card = measure_reels(model, arguments.split, arguments.seed, arguments.count, source=arguments.model)
    if arguments.out:
        write_card(card, arguments.out)
    print(json.dumps(card, indent=1, allow_nan=False) if arguments.json else table(card))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
