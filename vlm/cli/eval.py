"""Measure models by pinned protocols, and compare the cards."""

from __future__ import annotations

import argparse

from vlm.cli.programs import configure_programs, run_program

EXAMPLE = (
    "vlm eval retrieval --protocol world --annotations w/manifest.jsonl --videos w --model demo --out c.json"
)
_FOLDER = "eval"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    configure_programs(parser, _FOLDER)


def run(arguments: argparse.Namespace) -> int:
    """Run the program that was named."""
    return run_program(_FOLDER, arguments.program, arguments.rest)
