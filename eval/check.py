"""Say what of a benchmark is at hand: its files, counts, videos; without files, where to get them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from vlm.errors import InvalidInput, RejectedItems, UsageError
from vlm.evaluation import load_protocol
from vlm.evaluation.benchmarks.checking import CheckReport, check_benchmark
from vlm.evaluation.benchmarks.preparing import describe_classes, describe_protocol
from vlm.evaluation.classification.checking import check_classes
from vlm.evaluation.classification.protocol import (
    ClassificationProtocol,
    classification_protocol_files,
    load_classification_protocol,
)
from vlm.evaluation.protocol import Protocol

_EXAMPLE = "vlm eval check msrvtt-1ka --annotations MSRVTT_JSFUSION_test.csv --videos MSRVTT/videos"
_SHOWN = 10


def main(argv: list[str]) -> int:
    """Print what is there and what differs; exit code 3 for missing videos, 4 for unusable annotations."""
    parser = argparse.ArgumentParser(
        prog="vlm eval check", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("protocol", metavar="NAME", help="a name of `vlm eval list`")
    add("--annotations", type=Path, metavar="FILE|DIR", help="the annotation file, or the folder of all")
    add("--videos", type=Path, metavar="DIR", help="folder of the videos, at any depth")
    add("--decode", action="store_true", help="also open every video and decode its first frame")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the protocol")
    add("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    changes = tuple(arguments.set)
    if arguments.protocol in classification_protocol_files():
        protocol: Protocol | ClassificationProtocol = load_classification_protocol(
            arguments.protocol, changes
        )
    else:
        protocol = load_protocol(arguments.protocol, changes)
    if arguments.annotations is None and arguments.videos is None:
        lines = describe_protocol(protocol) if isinstance(protocol, Protocol) else describe_classes(protocol)
        print("\n".join(lines))
        return 0
    if protocol.layout == "world":
        raise InvalidInput(
            f"{protocol.name} is made on this machine, there is nothing to check: vlm data world"
        )
    if isinstance(protocol, Protocol):
        report = check_benchmark(protocol, arguments.annotations, arguments.videos, decode=arguments.decode)
    elif arguments.annotations is None:
        raise UsageError("--videos of a classification protocol are named by its --annotations")
    else:
        report = check_classes(protocol, arguments.annotations, arguments.videos, decode=arguments.decode)
    print(json.dumps(dataclasses.asdict(report), indent=1) if arguments.json else "\n".join(_lines(report)))
    if report.problems:
        raise InvalidInput(f"not {protocol.name} ({protocol.split}): {'; '.join(report.problems)}")
    lost = len(report.missing) + len(report.undecodable)
    if lost:
        raise RejectedItems(f"{lost} of {report.num_videos} videos of {protocol.name} cannot be used")
    return 0


def _lines(report: CheckReport) -> list[str]:
    lines = [f"{entry['name']}: sha256 {entry['sha256']}, {entry['state']}" for entry in report.files]
    lines += report.facts
    lines += [f"differs: {problem}" for problem in report.problems]
    for title, found in (("missing", report.missing), ("undecodable", report.undecodable)):
        lines += [f"{title}: {name} ({reason})" for name, reason in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"{title}: {len(found) - _SHOWN} more (all with --json)")
    if not (report.problems or report.missing or report.undecodable):
        lines.append(f"{report.protocol}: nothing differs")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
