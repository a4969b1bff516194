"""Say what a folder of shards is made of: lengths, sizes, codecs, captions, rejections."""

from __future__ import annotations

import argparse
import json
import sys

from vlm.data.shards.description import describe_shards
from vlm.data.shards.reader import ShardReader
from vlm.progress import progress_bar


def main(argv: list[str]) -> int:
    """Describe; 0 if every sample could be read."""
    parser = argparse.ArgumentParser(
        prog="vlm data describe", description=__doc__, epilog="example: vlm data describe shards --json"
    )
    parser.add_argument(
        "folder", metavar="DIR", help="folder that vlm data pack or index made; a path or a URL"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    arguments = parser.parse_args(argv)
    with progress_bar(len(ShardReader(arguments.folder).manifest.shards), "reading", "shard") as bar:
        report = describe_shards(arguments.folder, bar.update)
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        for name, value in report.items():
            inner = value.items() if isinstance(value, dict) else ()
            print(f"{name:20} {', '.join(f'{key} {item}' for key, item in inner) or value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
