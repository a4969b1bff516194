"""Turn a benchmark's published annotations into one file of our own layout, and print what to run then."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.errors import InvalidInput
from vlm.evaluation import load_protocol
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.benchmarks.preparing import measuring_command, prepare_benchmark
from vlm.evaluation.classification.protocol import classification_protocol_files

_EXAMPLE = "vlm eval prepare didemo --annotations LocalizingMoments/data --out didemo.json"


def main(argv: list[str]) -> int:
    """Write the file, print the command and the published numbers to expect."""
    parser = argparse.ArgumentParser(
        prog="vlm eval prepare", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("protocol", metavar="NAME", help="a name of `vlm eval list`")
    add(
        "--annotations",
        required=True,
        type=Path,
        metavar="FILE|DIR",
        help="the published file, or the folder",
    )
    add("--videos", default="DIR", metavar="DIR", help="folder of the videos, for the printed command")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the protocol")
    add("--out", required=True, type=Path, metavar="FILE.json", help="where to write")
    arguments = parser.parse_args(argv)
    if arguments.protocol in classification_protocol_files():
        raise InvalidInput(
            f"labels of {arguments.protocol} need no preparing: vlm eval classification reads them as they "
            f"are published, and vlm eval check {arguments.protocol} compares them"
        )
    protocol = load_protocol(arguments.protocol, tuple(arguments.set))
    if protocol.layout != "benchmark":
        raise InvalidInput(
            f"{protocol.name} is made on this machine, there is nothing to prepare: vlm data world"
        )
    prepare_benchmark(protocol, arguments.annotations, arguments.out)
    print(measuring_command(protocol, arguments.out, arguments.videos))
    for entry in protocol.published:
        print(f"# {describe_published(entry, protocol.num_trials)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
