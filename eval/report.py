"""Make the tables of a README anew from committed cards and results; --check says whether they are stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.errors import InvalidInput
from vlm.evaluation.card import write_whole
from vlm.evaluation.report import fill_tables, stale_tables


def main(argv: list[str]) -> int:
    """Rewrite the tables, or name the stale ones; 5 if there are any with --check."""
    parser = argparse.ArgumentParser(
        prog="vlm eval report",
        description=__doc__ + " A table stands between '<!-- table: NAME -->' and '<!-- end of table -->'.",
        epilog="example: vlm eval report README.md --check",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, default=Path("README.md"), help="the Markdown file (README.md)"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 5 if a table is stale"
    )
    arguments = parser.parse_args(argv)
    try:
        text = arguments.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{arguments.file}: cannot be read as text: {error}") from error
    stale = stale_tables(text)
    if stale and not arguments.check:
        write_whole(fill_tables(text), arguments.file)
    state = "stale" if arguments.check else "made anew"
    found = f"{state}: {', '.join(stale)}" if stale else "all tables are as the results say"
    print(f"{arguments.file}: {found}")
    return 5 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
