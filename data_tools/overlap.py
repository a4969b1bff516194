"""Find videos that two data sets share: by id, by hash, by what they show, and by a model's embedding."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlm.data.curation.overlap import Embed, describe_items, find_overlap, open_items, summarise
from vlm.data.decoding import Source, open_video
from vlm.data.frame_sampling import middle_frames
from vlm.progress import progress_bar


def main(argv: list[str]) -> int:
    """Compare; 0 if nothing is shared, 5 if something is."""
    parser = argparse.ArgumentParser(
        prog="vlm data overlap",
        description=__doc__ + " Exit code 5 if there are any.",
        epilog="example: vlm data overlap train_shards test.json --second-videos clips --model demo",
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
    report = summarise(first, second, matches)
    if arguments.json:
        print(json.dumps(report))
    else:
        for match in matches:
            print(f"{match.by}: {match.second!a} is {match.first!a} ({match.value:g})")
        counts = ", ".join(f"{way} {count}" for way, count in report["by"].items()) or "none"
        unreadable = len(first.unreadable) + len(second.unreadable)
        print(
            f"{report['num_second_in_first']} of {report['num_second']} videos are among the first set's "
            f"{report['num_first']} ({counts}); {unreadable} unreadable"
        )
    return 5 if matches else 0


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
