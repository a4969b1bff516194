"""Find videos that two data sets share: by id, by hash, by what they show, and by a model's embedding."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.data.curation.overlap import (
    Embed,
    describe_items,
    find_overlap,
    hash_set,
    open_items,
    summarise,
)
from vlm.data.decoding import Source, open_video
from vlm.data.frame_sampling import middle_frames
from vlm.progress import progress_bar
from vlm.retrieval.durability import write_bytes_durably


def main(argv: list[str]) -> int:
    """Compare; 0 if nothing is shared, 5 if something is."""
    parser = argparse.ArgumentParser(
        prog="vlm data overlap",
        description=__doc__ + " Exit code 5 if there are any. Equal captions are counted too.",
        epilog="example: vlm data overlap train_shards test.json --second-videos clips --out overlap.json",
    )
    for name, which in (("first", "training"), ("second", "test")):
        parser.add_argument(
            name, type=Path, help=f"{which} set: folder of shards or videos, or an annotation file"
        )
    for name in ("first", "second"):
        parser.add_argument(f"--{name}-videos", type=Path, metavar="DIR", help="videos of an annotation file")
    parser.add_argument("--no-pictures", action="store_true", help="compare ids and hashes, decode nothing")
    parser.add_argument(
        "--max-distance", type=float, default=0.3, metavar="X", help="of pictures, 0 to 1 (0.3)"
    )
    parser.add_argument("--model", metavar="SOURCE", help="compare this model's embeddings too")
    parser.add_argument(
        "--min-similarity", type=float, default=0.95, metavar="X", help="of embeddings (0.95)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the result here, for: vlm eval retrieval --overlap",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")
    arguments = parser.parse_args(argv)
    embed = None if arguments.model is None else _embedder(arguments.model)
    traits = []
    for path, videos in (
        (arguments.first, arguments.first_videos), (arguments.second, arguments.second_videos)
    ):  # fmt: skip
        with progress_bar(None, f"looking at {path.name}", "video") as bar:
            traits.append(
                describe_items(
                    open_items(path, videos),
                    pictures=not arguments.no_pictures,
                    embed=embed,
                    on_item=bar.update,
                )
            )
    first, second = traits
    matches = find_overlap(
        first, second, max_distance=arguments.max_distance, min_similarity=arguments.min_similarity
    )
    hashes = hash_set(arguments.first, first), hash_set(arguments.second, second)
    report = summarise(first, second, matches, hashes)
    if arguments.out is not None:
        write_bytes_durably(arguments.out, (json.dumps(report, indent=1) + "\n").encode())
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report, len(first.unreadable) + len(second.unreadable))
    return 5 if matches else 0


def _print(report: Mapping[str, Any], num_unreadable: int) -> None:
    for match in report["matches"]:
        print(f"{match['by']}: {match['second']!a} is {match['first']!a} ({match['value']:g})")
    counts = ", ".join(f"{way} {count}" for way, count in report["by"].items())
    print(
        f"{report['num_second_in_first']} of {report['num_second']} videos are among the first set's "
        f"{report['num_first']} ({counts}); {num_unreadable} unreadable"
    )
    if report["captions"] is not None:
        captions = report["captions"]
        print(f"{len(captions['shared'])} of {captions['num_second']} captions are among the first set's")


def _embedder(source: str) -> Embed:
    import torch

    import vlm
    from vlm.data.preprocessing import preprocess

    model = vlm.load_model(source)
    wanted = model.preprocessing

    def embed(video: Source) -> npt.NDArray[np.float32]:
        opened = open_video(video)
        frames = opened.read(middle_frames(opened.info.num_frames, wanted.num_frames))
        with torch.inference_mode():
            found = model.encode_video(preprocess(frames, wanted)[None].to(model.device))
        vector: npt.NDArray[np.float32] = found.embedding[0].float().cpu().numpy()
        return vector

    return embed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
