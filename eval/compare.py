"""Compare two cards query by query, with intervals; refuses cards of different protocols."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.evaluation import compare_cards, read_card, render_comparison


def main(argv: list[str]) -> int:
    """Print the paired differences B - A."""
    parser = argparse.ArgumentParser(
        prog="vlm eval compare",
        description=__doc__,
        epilog="example: vlm eval compare before.json after.json",
    )
    parser.add_argument(
        "cards", nargs=2, type=Path, metavar="CARD", help="two cards; printed is second - first"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    arguments = parser.parse_args(argv)
    first, second = arguments.cards
    comparison = compare_cards(read_card(first), read_card(second), (str(first), str(second)))
    print(json.dumps(comparison, indent=1) if arguments.json else render_comparison(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
