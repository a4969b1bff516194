"""Index WebDataset tars of other makers, so that they can be trained on; says what is missing or odd."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

from vlm.data.foreign import index_foreign
from vlm.data.packing import summary
from vlm.data.shards.layout import Media
from vlm.progress import progress_bar


def main(argv: list[str]) -> int:
    """Index; 0 if every sample is usable, 3 if some are not."""
    parser = argparse.ArgumentParser(
        prog="vlm data index", description=__doc__, epilog="example: vlm data index downloaded/ --out shards"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with .tar files")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the index goes; beside the tars if left out"
    )
    parser.add_argument(
        "--media", choices=get_args(Media), default="video", help="what the samples are (video)"
    )
    parser.add_argument("--no-decode", action="store_true", help="do not try whether they decode")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    arguments = parser.parse_args(argv)
    with progress_bar(len(list(arguments.folder.glob("*.tar"))), "indexing", "shard") as bar:
        manifest = index_foreign(
            arguments.folder,
            arguments.out,
            media=arguments.media,
            decode=not arguments.no_decode,
            on_shard=bar.update,
        )
    report = summary(manifest)
    if arguments.json:
        print(json.dumps(report))
    else:
        for item in manifest.rejected:
            print(f"rejected {item.item!a}: {item.reason} ({item.detail!a})")
        for reason, count in Counter(item.reason for item in manifest.odd).most_common():
            print(f"odd: {reason} in {count} samples")
        print(
            f"{report['num_samples']} samples in {report['num_shards']} shards; "
            f"{report['num_rejected']} rejected"
        )
    return 3 if manifest.rejected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
