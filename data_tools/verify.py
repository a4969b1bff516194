"""Check shards byte by byte against their manifest, and name every damaged sample."""

from __future__ import annotations

import argparse
import json
import sys

from vlm.data.shards.reader import ShardReader
from vlm.data.shards.verification import verify_shards
from vlm.progress import progress_bar


def main(argv: list[str]) -> int:
    """Verify; 0 if all is well, 5 if anything is damaged."""
    parser = argparse.ArgumentParser(
        prog="vlm data verify", description=__doc__, epilog="example: vlm data verify shards"
    )
    parser.add_argument(
        "folder", metavar="DIR", help="folder that vlm data pack or index made; a path or a URL"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    arguments = parser.parse_args(argv)
    manifest = ShardReader(arguments.folder).manifest
    with progress_bar(len(manifest.shards), "verifying", "shard") as bar:
        findings = verify_shards(arguments.folder, bar.update)
    if arguments.json:
        print(
            json.dumps(
                {"num_samples": manifest.num_samples, "findings": [finding._asdict() for finding in findings]}
            )
        )
    else:
        for finding in findings:
            print(f"{finding.file}: {finding.key or '-'}: {finding.reason}: {finding.detail}")
        print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards, {len(findings)} findings")
    return 5 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
