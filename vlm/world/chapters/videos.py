"""A long video is a row of scenes with pauses: one to five minutes, ten to forty events."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.errors import InvalidInput
from vlm.progress import progress_bar
from vlm.world.captions import caption
from vlm.world.clips import encode
from vlm.world.facts import truth_matrix
from vlm.world.render import render
from vlm.world.sampling import sample_scene
from vlm.world.scene import FPS, NUM_FRAMES, VERSION, Scene

MANIFEST = "manifest.jsonl"
MOMENTS = "moments.jsonl"
_KEY = 20261127
_SCENES = 1_000  # of the stream that belong to one video
_SHORTEST_S, _LONGEST_S = 60, 300
_EVENTS = (10, 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongVideo:
    """Scenes in order, each followed by a pause in which its last frame stands still.

    Attributes:
        seed: Seed of the stream it comes from.
        index: Its place in that stream.
        chapters: The scenes.
        pauses: Frames of the pause after each.
    """

    seed: int
    index: int
    chapters: tuple[Scene, ...]
    pauses: tuple[int, ...]

    @property
    def video_id(self) -> str:
        """Name of the video, such as ``long-7-000012``."""
        return f"long-{self.seed}-{self.index:06d}"

    @property
    def starts(self) -> tuple[int, ...]:
        """Frame with which each chapter begins."""
        lengths = np.asarray(self.pauses[:-1], np.int64) + NUM_FRAMES
        return (0, *np.cumsum(lengths).tolist())

    @property
    def num_frames(self) -> int:
        """Frames of the whole video."""
        return len(self.chapters) * NUM_FRAMES + sum(self.pauses)

    @property
    def num_events(self) -> int:
        """Events of all chapters."""
        return sum(len(scene.events) for scene in self.chapters)


def sample_long(seed: int, index: int) -> LongVideo:
    """Return long video ``index`` of a stream: a pure function, the same on every machine.

    Raises:
        ValueError: ``seed`` or ``index`` is negative.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"expected seed >= 0 and index >= 0, got {seed} and {index}")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_KEY, seed, index])))
    wanted = int(rng.integers(_EVENTS[0], _EVENTS[1] + 1))
    scenes: list[Scene] = []
    place = 0
    while (left := wanted - sum(len(scene.events) for scene in scenes)) > 0:
        scene = sample_scene("long", seed, index * _SCENES + place)
        place += 1
        if len(scene.events) <= left:
            scenes.append(scene)
    busy = len(scenes) * NUM_FRAMES
    total = int(rng.integers(max(_SHORTEST_S * FPS, busy), _LONGEST_S * FPS + 1))
    pauses = rng.multinomial(total - busy, [1 / len(scenes)] * len(scenes))
    return LongVideo(seed=seed, index=index, chapters=tuple(scenes), pauses=tuple(map(int, pauses)))


def draw(video: LongVideo, size: int) -> npt.NDArray[np.uint8]:
    """Return all frames of a long video, (t, size, size, 3) uint8."""
    parts = []
    for scene, pause in zip(video.chapters, video.pauses, strict=True):
        frames = render(scene, size=size)
        parts += [frames, np.repeat(frames[-1:], pause, axis=0)]
    return np.concatenate(parts)


def describe_long(video: LongVideo) -> dict[str, Any]:
    """Return a video's manifest record: its chapters with captions, scenes and times in seconds."""
    return {
        "id": video.video_id,
        "file": f"{video.video_id}.mp4",
        "version": VERSION,
        "split": "long",
        "fps": FPS,
        "num_frames": video.num_frames,
        "duration_s": video.num_frames / FPS,
        "num_events": video.num_events,
        "chapters": [
            {
                "caption": caption(scene),
                "start_s": start / FPS,
                "end_s": (start + NUM_FRAMES) / FPS,
                "scene": json.loads(scene.to_json()),
            }
            for scene, start in zip(video.chapters, video.starts, strict=True)
        ],
    }


def moments_of(video: LongVideo) -> list[dict[str, Any]]:
    """Return a query for each chapter with every stretch that it is true of, in QVHighlights' layout."""
    true = truth_matrix(video.chapters, video.chapters)
    windows = [[start / FPS, (start + NUM_FRAMES) / FPS] for start in video.starts]
    return [
        {
            "qid": f"{video.video_id}-{place:02d}",
            "query": caption(scene),
            "vid": video.video_id,
            "duration": video.num_frames / FPS,
            "relevant_windows": [windows[other] for other in np.flatnonzero(true[place]).tolist()],
        }
        for place, scene in enumerate(video.chapters)
    ]


def moments_hash(videos: Sequence[LongVideo]) -> str:
    """Return the hash of the videos' queries and windows, by which a protocol freezes them."""
    return hashlib.sha256(_lines(row for video in videos for row in moments_of(video)).encode()).hexdigest()


def write_long(videos: Sequence[LongVideo], out: Path, *, size: int = 64) -> Path:
    """Write every video, then ``moments.jsonl`` and ``manifest.jsonl``; videos that are there are kept.

    Args:
        videos: What to write.
        out: Folder, made if missing.
        size: Side of the picture in pixels.

    Returns:
        The manifest's path.

    Raises:
        InvalidInput: The folder holds a manifest of other videos.
    """
    manifest = _lines(describe_long(video) for video in videos)
    target = out / MANIFEST
    if target.exists() and target.read_text() != manifest:
        raise InvalidInput(f"{out} already holds other videos; give an empty folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(len(videos), "videos", unit="video") as bar:
        for video in videos:
            path = out / f"{video.video_id}.mp4"
            if not path.exists():
                encode(draw(video, size), path)
            bar.update()
    for name, text in (
        (MOMENTS, _lines(row for video in videos for row in moments_of(video))),
        (MANIFEST, manifest),
    ):
        partial = out / f".{name}.{os.getpid()}.partial"
        partial.write_text(text)
        os.replace(partial, out / name)
    return target


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
