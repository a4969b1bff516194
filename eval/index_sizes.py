"""Measure the bytes of a segment: in the vector log, in the catalogue, and in the memory of a reader."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from vlm.evaluation.tradeoff.stored import store
from vlm.evaluation.tradeoff.synthetic import SEGMENTS_PER_VIDEO, SyntheticVectors

_HASHES = 8


def main(argv: list[str]) -> int:
    """Make an index of made-up videos and print what a segment of it takes."""
    parser = argparse.ArgumentParser(
        prog="vlm eval index_sizes", description=__doc__, epilog="example: vlm eval index_sizes --json"
    )
    parser.add_argument("--segments", type=int, default=100_000, metavar="N", help="how many (100000)")
    parser.add_argument("--dim", type=int, default=512, help="length of a vector (512)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder, num_rows = Path(scratch) / "index", arguments.segments
        vectors = SyntheticVectors(arguments.dim)
        snapshot = store(folder, vectors, num_rows, num_frames=_HASHES).snapshot
        held = (snapshot.row_video, snapshot.row_bounds, snapshot.row_hashes)
        sizes = {
            "vectors": sum(path.stat().st_size for path in (folder / "vectors").iterdir()) / num_rows,
            "catalogue": (folder / "catalog.sqlite").stat().st_size / num_rows,
            "reader_memory": sum(array.nbytes for array in held) / num_rows,
        }
    if arguments.json:
        settings = {"segments": num_rows, "segments_per_video": SEGMENTS_PER_VIDEO, "hashes": _HASHES}
        print(json.dumps({**settings, "bytes_per_segment": sizes}))
        return 0
    print(
        f"{num_rows} segments of {arguments.dim} numbers, {SEGMENTS_PER_VIDEO} a video, {_HASHES} frames each"
    )
    for name, size in sizes.items():
        print(f"{name.replace('_', ' '):<14} {size:8.1f} bytes a segment")
    return 0
