"""Pack videos and captions into shards, or pictures: every item is packed or rejected with its reason."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from vlm.data.annotations import LAYOUTS, Annotation, read_annotations, read_folder
from vlm.data.annotations.labels import READERS, read_labelled
from vlm.data.packing import pack, summary
from vlm.data.reencoding import Reencoding
from vlm.data.shards.layout import Media


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm data pack",
        description=__doc__,
        epilog="example: vlm data pack --annotations msrvtt_ret_train9k.json --videos clips --out shards",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--annotations", type=Path, metavar="FILE", help="captions or labels by video, see --layout"
    )
    source.add_argument(
        "--folder", type=Path, metavar="DIR", help="videos with captions beside them (.txt or .json)"
    )
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="folder that the names of videos or pictures start from"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--media", choices=get_args(Media), default="video", help="what is packed (video)")
    parser.add_argument(
        "--layout",
        default="auto",
        choices=["auto", *LAYOUTS, *READERS],
        help=f"of the annotation file; {', '.join(READERS)} hold labels for vlm train's classification",
    )
    parser.add_argument("--part", metavar="NAME", help="of labels: the part to take, such as training")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="of labels: the names of the classes")
    parser.add_argument("--video-column", metavar="NAME", help="of a CSV or Parquet file: the videos' names")
    parser.add_argument("--caption-column", metavar="NAME", help="of a CSV or Parquet file: the captions")
    parser.add_argument("--max-shard-mb", type=int, default=256, metavar="N", help="largest shard (256)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that check files (2)")
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


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program if the arguments do not fit together."""
    has_labels = arguments.layout in READERS
    if arguments.folder is not None and (
        arguments.layout != "auto" or arguments.video_column or arguments.caption_column
    ):
        parser.error(
            "--layout and columns are of --annotations; a folder that holds a folder of videos a class is "
            "packed by --annotations DIR --layout folder"
        )
    if arguments.annotations is not None and arguments.videos is None and arguments.layout != "folder":
        parser.error("--annotations needs --videos DIR")
    if not has_labels and (arguments.part or arguments.classes):
        parser.error(f"--part and --classes need a --layout with labels: {', '.join(READERS)}")
    if has_labels and (arguments.video_column or arguments.caption_column):
        parser.error("columns can be named for csv and parquet only")
    if arguments.max_shard_mb < 1:
        parser.error("--max-shard-mb must be at least 1")
    if arguments.reencode is not None and arguments.reencode < 16:
        parser.error("--reencode needs a short side of at least 16 pixels")
    if arguments.reencode is not None and arguments.media == "image":
        parser.error("--reencode is for videos; pictures are packed as they are")


def _read(arguments: argparse.Namespace) -> tuple[list[Annotation], Path, tuple[str, ...]]:
    """Return what to pack, the folder that names start from, and the names of classes."""
    if arguments.folder is not None:
        return read_folder(arguments.folder, arguments.media), arguments.videos or arguments.folder, ()
    if arguments.layout in READERS:
        root = arguments.annotations if arguments.layout == "folder" else arguments.videos
        labelled = read_labelled(
            arguments.annotations,
            root,
            layout=arguments.layout,
            part=arguments.part,
            classes=arguments.classes,
        )
        return labelled.annotations(), root, labelled.classes
    annotations = read_annotations(
        arguments.annotations,
        arguments.layout,
        video_column=arguments.video_column,
        caption_column=arguments.caption_column,
    )
    return annotations, arguments.videos, ()


def main(argv: list[str]) -> int:
    """Pack; 0 if every item is in, 3 if some were rejected."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    try:
        annotations, videos, classes = _read(arguments)
    except ValueError as error:
        parser.error(str(error))
    manifest = pack(
        annotations,
        videos,
        arguments.out,
        max_shard_bytes=arguments.max_shard_mb << 20,
        workers=arguments.workers,
        reencoding=None if arguments.reencode is None else Reencoding(short_side=arguments.reencode),
        media=arguments.media,
        classes=classes,
    )
    report = summary(manifest)
    if arguments.json:
        print(json.dumps(report))
    else:
        for item in manifest.rejected:
            print(f"rejected {item.item!a}: {item.reason} ({item.detail})")
        length = f"videos, {report['duration_s']:.0f} s" if manifest.media == "video" else "pictures"
        print(
            f"{report['num_samples']} {length}, in {report['num_shards']} shards "
            f"of {report['num_bytes'] / 1e6:.1f} MB; {report['num_rejected']} rejected"
        )
    return 3 if manifest.rejected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
