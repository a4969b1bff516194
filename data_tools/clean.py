"""Clean captions and drop doubles, and videos that look like another; says what went and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.data.annotations import LAYOUTS, read_rows
from vlm.data.curation.cleaning import CleaningRules, clean_captions, drop_copies
from vlm.data.shards.layout import write_atomically
from vlm.errors import InvalidInput
from vlm.progress import progress_bar


def main(argv: list[str]) -> int:
    """Clean; 0 when the cleaned file is written."""
    parser = argparse.ArgumentParser(
        prog="vlm data clean",
        description=__doc__,
        epilog="example: vlm data clean captions.csv --videos clips --out cleaned.json",
    )
    parser.add_argument("annotations", type=Path, metavar="FILE", help="captions by video, see --layout")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new JSON list, for pack")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="look at the videos too, and drop copies")
    parser.add_argument("--layout", default="auto", choices=["auto", *LAYOUTS], help="of the annotation file")
    parser.add_argument("--min-words", type=int, default=2, metavar="N", help="of a caption (2)")
    parser.add_argument("--max-words", type=int, default=200, metavar="N", help="of a caption (200)")
    parser.add_argument(
        "--max-videos", type=int, default=50, metavar="N", help="videos that may share a caption (50)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    arguments = parser.parse_args(argv)
    try:
        rules = CleaningRules(
            min_words=arguments.min_words, max_words=arguments.max_words, max_videos=arguments.max_videos
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.out.exists():
        raise InvalidInput(f"{arguments.out}: exists already; choose another --out or remove it")
    kept, report = clean_captions(read_rows(arguments.annotations, arguments.layout), rules)
    if arguments.videos is not None:
        with progress_bar(len(kept), "looking", "video") as bar:
            kept = drop_copies(kept, arguments.videos, report, on_video=bar.update)
    # metadata may hold another column that is called video or caption
    rows = [{**e.metadata, "video": e.video, "caption": list(e.captions)} for e in kept]
    write_atomically(arguments.out, json.dumps(rows, ensure_ascii=True, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(report.as_json()))
    else:
        for item in report.rejected:
            print(f"dropped {item.item!a}: {item.reason} ({item.detail!a})")
        for reason, count in report.captions.most_common():
            print(f"captions dropped: {reason} {count}")
        print(f"videos {report.num_videos[0]} -> {report.num_videos[1]}, ", end="")
        print(f"captions {report.num_captions[0]} -> {report.num_captions[1]}, {report.num_changed} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
