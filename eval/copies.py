"""Count how many copies of videos are taken for copies, how many turned round are, and how many others."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.errors import InvalidInput, VlmError
from vlm.retrieval.durability import write_bytes_durably

if TYPE_CHECKING:
    from vlm.retrieval.manifest import Snapshot

FORMAT = "vlm-copies/1"
# what a copy is: smaller, compressed harder, with fewer frames, cut at its beginning
_SIZE, _RATE_FACTOR, _FPS, _CUT_S, _LENGTH_S = (256, 144), 33, 15, 1.3, 60.0
_EXAMPLE = "vlm eval copies --videos ~/Videos --out copies.json"


def main(argv: list[str]) -> int:
    """Make the copies, index all, judge every pair by its middle moment."""
    parser = argparse.ArgumentParser(
        prog="vlm eval copies", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    parser.add_argument("--videos", nargs="+", required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="vlm-copies-") as scratch:
        found = _measure(arguments.videos, Path(scratch))
    copies, turned, others = (found[name] for name in ("copies", "turned", "others"))
    print(
        f"{found['videos']} videos: taken for copies are {copies['taken']} of {copies['of']} copies, "
        f"{turned['taken']} of {turned['of']} turned round, {others['taken']} of {others['of']} others; "
        f"the end of what they share is placed within {copies['median_end_error_s']:.2f} s for half"
    )
    if arguments.out:
        write_bytes_durably(arguments.out, json.dumps(found, indent=1).encode() + b"\n")
    return 0


def _measure(paths: list[str], work: Path) -> dict[str, Any]:
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.ingest.scanning import scan_paths
    from vlm.retrieval.words.no_model import load_encoder

    made = work / "videos"
    for kind in ("own", "copy", "back"):
        (made / kind).mkdir(parents=True)
    num_videos = num_without = 0
    for path in scan_paths(paths, work / "index").files:
        try:
            _copy(path, made, f"{num_videos}.mp4")
        except VlmError:
            num_without += 1
            continue
        (made / "own" / f"{num_videos}{path.suffix}").symlink_to(path.resolve())
        num_videos += 1
    if num_videos < 2:
        raise InvalidInput(f"expected at least two videos of more than {_CUT_S + 1} s, found {num_videos}")
    index = VideoIndex.create(work / "index", load_encoder("none"), source="none")
    for kind in ("own", "copy", "back"):
        index.add([made / kind], model=load_encoder("none"))
    counts = {"videos": num_videos, "short_or_broken": num_without}
    return {"format": FORMAT, **counts, **_judge(index.snapshot, index.manifest.grid_step_s)}


def _copy(path: Path, folder: Path, name: str) -> None:
    """Write a copy and one turned round."""
    import av

    from vlm.data.decoding import open_video

    with open_video(path) as video:
        end_s = min(float(video.times_s[-1]), _LENGTH_S)
        if end_s < _CUT_S + 1:
            raise InvalidInput(f"{path}: shorter than {_CUT_S + 1} s")
        wanted = video.frames_at(np.arange(_CUT_S, end_s, 1 / _FPS))
        frames = {}
        for number, pixels in video.iterate(np.unique(wanted)):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frames[int(number)] = picture.reformat(*_SIZE, format="yuv420p").to_ndarray()
    for kind, order in (("copy", wanted), ("back", wanted[::-1])):
        with av.open(str(folder / kind / name), "w") as container:
            stream = container.add_stream("libx264", rate=_FPS, options={"crf": str(_RATE_FACTOR)})
            stream.width, stream.height = _SIZE
            stream.pix_fmt = "yuv420p"
            for number in order.tolist():
                picture = av.VideoFrame.from_ndarray(frames[number], "yuv420p")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())


def _judge(snapshot: Snapshot, grid_step_s: float | None) -> dict[str, Any]:
    """Look at each pair as a search does that finds the moment in both."""
    from vlm.retrieval.duplicates.grouping import group_alike

    rows: dict[tuple[str, str], list[int]] = {}
    for row, video in enumerate(snapshot.row_video):
        path = Path(os.fsdecode(snapshot.videos[int(video)].path))
        rows.setdefault((path.parent.name, path.stem), []).append(row)
    own = [name for kind, name in rows if kind == "own"]
    counts = {"copies": [0, 0], "turned": [0, 0], "others": [0, 0]}
    errors = []
    for name in own:
        moment = rows["own", name][len(rows["own", name]) // 2]
        middle_s = snapshot.row_bounds[moment].mean()
        for kind, group in (("copy", "copies"), ("back", "turned"), ("own", "others")):
            for other in own if kind == "own" else [name]:
                if (kind, other) == ("own", name) or (kind, other) not in rows:
                    continue
                choice = np.array(rows[kind, other])
                middles_s = snapshot.row_bounds[choice].mean(axis=1)
                if kind == "back":
                    middles_s = snapshot.row_bounds[choice].max() - middles_s
                shift_s = 0.0 if kind == "own" else _CUT_S
                nearest = choice[np.abs(middles_s + shift_s - middle_s).argmin()]
                groups = group_alike(snapshot, [moment, int(nearest)], grid_step_s)
                counts[group][0] += len(groups) == 1
                counts[group][1] += 1
                if len(groups) == 1 and kind == "copy":
                    overlap = groups[0].copies[0][1]
                    errors.append(abs(overlap.other_end_s - (overlap.end_s - _CUT_S)))
    found: dict[str, Any] = {name: {"taken": taken, "of": of} for name, (taken, of) in counts.items()}
    found["copies"]["median_end_error_s"] = float(np.median(errors)) if errors else None
    found["copies"]["p90_end_error_s"] = float(np.quantile(errors, 0.9)) if errors else None
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
