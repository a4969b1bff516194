"""Say what this machine can do, and what is wrong."""

from __future__ import annotations

import argparse

EXAMPLE = "vlm doctor --json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 0 if nothing is wrong."""
    return 0
