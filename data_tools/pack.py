"""Pack videos and captions into shards: every item is packed or rejected with its reason."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.data.annotations import LAYOUTS, read_annotations, read_folder
from vlm.data.packing import pack, summary
from vlm.data.reencoding import Reencoding


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm data pack",
        description=__doc__,
        epilog="example: vlm data pack --annotations msrvtt_ret_train9k.json --videos clips --out shards",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", type=Path, metavar="FILE", help="captions by video, see --layout")
    source.add_argument(
        "--folder", type=Path, metavar="DIR", help="videos with captions beside them (.txt or .json)"
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder that the videos' names start from")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--layout", default="auto", choices=["auto", *LAYOUTS], help="of the annotation file")
    parser.add_argument("--video-column", metavar="NAME", help="of a CSV or Parquet file: the videos' names")
    parser.add_argument("--caption-column", metavar="NAME", help="of a CSV or Parquet file: the captions")
    parser.add_argument("--max-shard-mb", type=int, default=256, metavar="N", help="largest shard (256)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that check videos (2)")
    parser.add_argument(
        "--reencode",
        nargs="?",
        type=int,
        const=256,
        metavar="SIDE",
        help="encode every video anew: short side of at most SIDE pixels (256), no sound, a keyframe every "
        "30 frames, so that any frame is quickly reached",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    return parser


def main(argv: list[str]) -> int:
    """Pack; 0 if every item is in, 3 if some were rejected."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.annotations is not None and arguments.videos is None:
        parser.error("--annotations needs --videos DIR")
    if arguments.max_shard_mb < 1:
        parser.error("--max-shard-mb must be at least 1")
    if arguments.reencode is not None and arguments.reencode < 16:
        parser.error("--reencode needs a short side of at least 16 pixels")
    if arguments.folder is not None:
        annotations, videos = read_folder(arguments.folder), arguments.videos or arguments.folder
    else:
        try:
            annotations = read_annotations(
                arguments.annotations,
                arguments.layout,
                video_column=arguments.video_column,
                caption_column=arguments.caption_column,
            )
        except ValueError as error:
            parser.error(str(error))
        videos = arguments.videos
    manifest = pack(
        annotations,
        videos,
        arguments.out,
        max_shard_bytes=arguments.max_shard_mb << 20,
        workers=arguments.workers,
        reencoding=None if arguments.reencode is None else Reencoding(short_side=arguments.reencode),
    )
    report = summary(manifest)
    if arguments.json:
        print(json.dumps(report))
    else:
        for item in manifest.rejected:
            print(f"rejected {item.item!a}: {item.reason} ({item.detail})")
        print(
            f"{report['num_samples']} videos, {report['duration_s']:.0f} s, in {report['num_shards']} shards "
            f"of {report['num_bytes'] / 1e6:.1f} MB; {report['num_rejected']} rejected"
        )
    return 3 if manifest.rejected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
