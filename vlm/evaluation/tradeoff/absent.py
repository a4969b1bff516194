"""Who is told apart by a hit's grade: captions of what an index holds, and of what was left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.retrieval.index import VideoIndex
from vlm.retrieval.searcher import Searcher
from vlm.types import VideoTextEncoder
from vlm.world import FPS, NUM_FRAMES, Scene, caption, gallery, render, truth_matrix
from vlm.world.clips import encode

_SCENES_A_VIDEO = 4
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Divided:
    """Scenes of things that an index holds, and scenes that show a thing that it lacks.

    Attributes:
        present: To be indexed; their captions ask for what is there.
        absent: Of none of the indexed scenes is any of their captions true.
    """

    present: tuple[Scene, ...]
    absent: tuple[Scene, ...]


def divide(split: str, seed: int, count: int, *, num_absent: int, choice: int) -> Divided:
    """Draw scenes of the digit world and leave some things (a digit of a colour) out.

    Args:
        split: Of the world.
        seed: Which scenes.
        count: How many are drawn; those with a thing that is left out become queries.
        num_absent: How many of the things that occur are left out.
        choice: Which things.
    """
    scenes = list(gallery(split, seed, count))
    things = [frozenset((thing.colour, thing.digit) for thing in scene.things) for scene in scenes]
    every = sorted(set().union(*things))
    kept = {every[i] for i in np.random.default_rng(choice).permutation(len(every))[num_absent:]}
    present = [scene for scene, shown in zip(scenes, things, strict=True) if shown <= kept]
    others = [scene for scene, shown in zip(scenes, things, strict=True) if not shown <= kept]
    is_true = np.count_nonzero(truth_matrix(others, present), axis=1)
    return Divided(
        tuple(present), tuple(scene for scene, true in zip(others, is_true.tolist(), strict=True) if not true)
    )


def index_scenes(folder: Path, model: VideoTextEncoder, scenes: Sequence[Scene]) -> Searcher:
    """Index videos of four scenes in a row, a segment each, in a new folder; return a searcher of them."""
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for first in range(0, len(scenes), _SCENES_A_VIDEO):
        frames = np.concatenate([render(scene) for scene in scenes[first : first + _SCENES_A_VIDEO]])
        encode(frames, videos / f"{first:03}.mp4")
    clip_s = NUM_FRAMES / FPS
    index = VideoIndex.create(folder / "index", model, segment_s=clip_s, stride_s=clip_s)
    index.add([videos], model=model, allow_narrow_model=True)
    return Searcher(index, model)


def share_strong(searcher: Searcher, scenes: Sequence[Scene], rerank: int) -> float:
    """Return of how many scenes' captions a strong hit is among the first three."""
    found = [
        any(hit.strength == "strong" for hit in searcher.search(caption(scene), top_k=_SHOWN, rerank=rerank))
        for scene in scenes
    ]
    return float(np.mean(found))
