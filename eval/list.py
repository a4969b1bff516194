"""List the protocols that can be measured, each with its file."""

from __future__ import annotations

import argparse
import json
import sys

from vlm.config import to_dict
from vlm.evaluation import load_protocol, protocol_files
from vlm.evaluation.classification.protocol import (
    ClassificationProtocol,
    classification_protocol_files,
    load_classification_protocol,
)
from vlm.evaluation.protocol import Protocol


def main(argv: list[str]) -> int:
    """Print one line a protocol, or all settings as JSON."""
    parser = argparse.ArgumentParser(
        prog="vlm eval list", description=__doc__, epilog="example: vlm eval list --json"
    )
    parser.add_argument("--json", action="store_true", help="print every setting as a JSON object")
    arguments = parser.parse_args(argv)
    protocols: list[Protocol | ClassificationProtocol] = [load_protocol(name) for name in protocol_files()]
    protocols += [load_classification_protocol(name) for name in classification_protocol_files()]
    if arguments.json:
        settings = [to_dict(protocol) for protocol in protocols]
        for entry in settings:
            entry.pop("freeze", None)
        print(json.dumps(settings, indent=1))
        return 0
    width = max(len(protocol.name) for protocol in protocols)
    for protocol in protocols:
        task = protocol.task if isinstance(protocol, Protocol) else "classification"
        print(f"{protocol.name:<{width}}  v{protocol.version}  {task:<15}  {protocol.summary}")
    print("\nwhere the files of one come from, their terms, counts and hashes: vlm eval check NAME")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
