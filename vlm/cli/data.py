"""Make, pack, check and describe data sets of videos and captions."""

from __future__ import annotations

import argparse

from vlm.cli.programs import configure_programs, run_program

EXAMPLE = "vlm data pack --annotations captions.json --videos clips --out shards"
_FOLDER = "data_tools"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    configure_programs(parser, _FOLDER)


def run(arguments: argparse.Namespace) -> int:
    """Run the program that was named."""
    return run_program(_FOLDER, arguments.program, arguments.rest)
