"""Write clips of the digit world: mp4 files and manifest.jsonl, the same for a seed on every machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.world.chapters import sample_long, write_long
from vlm.world.clips import write_clips
from vlm.world.sampling import gallery
from vlm.world.splits import SPLITS

EXAMPLE = "vlm data world --split test --seed 0 --count 500 --twins --out clips/"


def main(argv: list[str]) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="vlm data world", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("--split", required=True, choices=SPLITS, help="which part of the world")
    parser.add_argument("--seed", type=_natural, required=True, help="any seed names another stream of clips")
    parser.add_argument("--count", type=_positive, required=True, help="how many clips, without their twins")
    parser.add_argument(
        "--twins", action="store_true", help="only clips that have a reversed twin, each followed by it"
    )
    parser.add_argument("--size", type=int, choices=(64, 128, 256), default=64, help="side in pixels")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or the one to go on with")
    asked = parser.parse_args(argv)
    if asked.split == "long":
        if asked.twins:
            parser.error("--twins: a long video has no twin")
        videos = [sample_long(asked.seed, index) for index in range(asked.count)]
        print(write_long(videos, asked.out, size=asked.size))
        return 0
    scenes = list(gallery(asked.split, asked.seed, asked.count, twins=asked.twins))
    print(write_clips(scenes, asked.out, size=asked.size))
    return 0


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
