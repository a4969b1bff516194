"""Scenes onto disk: one mp4 file a clip and a manifest that says everything about each of them.

Every frame is coded by itself and with a constant quantiser: inter-frame coding leaves ghosts from which
a single frame tells the direction, and a rate control that looks ahead could do the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.errors import InvalidInput
from vlm.progress import progress_bar
from vlm.world.captions import caption, choose_template, templates
from vlm.world.digits import BLOCKS
from vlm.world.oracles import ceilings
from vlm.world.questions import questions, vocabulary
from vlm.world.render import render, sample_frames
from vlm.world.sampling import NUM_OOD_TEXTURES, OOD_SIZES, PLANS, gallery
from vlm.world.scene import COLOURS, FPS, KINDS, NUM_FRAMES, SIDE, VERSION, Event, Scene
from vlm.world.splits import held_combinations, scene_key
from vlm.world.twins import has_twin

MANIFEST = "manifest.jsonl"
CHECKSUMS = "SHA256SUMS"
HEADER = "world.json"
QUANTISER = 16  # of 0 to 51; the coding error then stays below the pixel noise
FIRST_SPLITS = ("train", "val", "test", "combo")  # which world.yaml froze
# each with settings that code every frame by itself, at a constant quantiser and full colour; VP9 without
# loss, since its rate control looks at earlier frames even so
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "libx264": (
        "yuv444p",
        {
            "qp": str(QUANTISER),
            "x264-params": "keyint=1:bframes=0:scenecut=0:rc-lookahead=0:mbtree=0:log-level=error",
        },
    ),
    "mjpeg": ("yuvj444p", {"qmin": "2", "qmax": "2"}),
    "libvpx-vp9": (
        "yuv444p",
        {"lossless": "1", "g": "1", "lag-in-frames": "0", "auto-alt-ref": "0", "cpu-used": "5"},
    ),
}
_OOD_CODECS = ("mjpeg", "libvpx-vp9")


def describe(scene: Scene, frames: npt.NDArray[np.uint8] | None = None) -> dict[str, Any]:
    """Return a clip's manifest record; with ``frames`` (40, s, s, 3) also their hash.

    Frame numbers and times are the clip's own: frame f is shown from f / 8 seconds on. An event's state
    before lasts until ``start_frame``, the state after begins at ``end_frame``.
    """
    record: dict[str, Any] = {
        "id": scene.clip_id,
        "file": f"{scene.clip_id}.mp4",
        "version": VERSION,
        "split": scene.split,
        "scene_key": scene_key(scene),
        "twin_id": scene.backwards().clip_id if has_twin(scene) else None,
        "held_out": list(held_combinations(scene)),
        "caption": caption(scene),
        "template": choose_template(scene).name,
        "fps": FPS,
        "num_frames": NUM_FRAMES,
        "objects": [
            {"image": thing.image, "digit": thing.digit, "colour": thing.colour, "size": thing.size}
            for thing in scene.things
        ],
        "events": [_event_record(event) for event in scene.timeline],
        "questions": [
            {
                "kind": item.kind,
                "question": item.text,
                "options": list(item.options),
                "statements": list(item.statements),
                "answer": item.answer,
                "answer_index": item.answer_index,
            }
            for item in questions(scene)
        ],
        "scene": json.loads(scene.to_json()),
    }
    if frames is not None:
        record["frames_sha256"] = hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()
    return record


def _event_record(event: Event) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "direction": event.direction,
        "object": event.subject,
        "partner": event.partner,
        "start_frame": event.start,
        "end_frame": event.end,
        "start_s": event.start / FPS,
        "end_s": event.end / FPS,
        "speed": event.speed,
        "count": event.count,
    }


def manifest_hash(scenes: Iterable[Scene]) -> str:
    """Return the SHA-256 of the scenes' manifest lines, without pixels; the protocol freezes it."""
    whole = hashlib.sha256()
    for scene in scenes:
        whole.update(_line(describe(scene)).encode())
    return whole.hexdigest()


def read_manifest(path: Path) -> list[Scene]:
    """Return the scenes of a manifest, in its order.

    Raises:
        InvalidInput: A line is not a record of this version of the world.
    """
    scenes = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["version"] != VERSION:
                raise ValueError(f"version {record['version']!r}")
            scenes.append(Scene.from_json(json.dumps(record["scene"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"{path}, line {number}: expected a record of {VERSION}, got {error}; write it anew with"
                " `vlm data world`"
            ) from error
    return scenes


def write_clips(scenes: Sequence[Scene], out: Path, *, size: int = SIDE) -> Path:
    """Write every clip, then the manifest; what an interrupted run wrote is kept and not written again.

    ``manifest.jsonl`` is the same on every machine; the hashes of the files, which depend on the encoder's
    build, are in ``SHA256SUMS``.

    Args:
        scenes: What to write; the file names are the clip ids.
        out: Folder, made if missing.
        size: Side of the picture in pixels.

    Returns:
        The manifest's path.

    Raises:
        InvalidInput: The folder already holds other clips.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(scenes, out, size)
    known = _read_checksums(out / CHECKSUMS)
    lines = []
    with (
        open(out / CHECKSUMS, "a") as checksums,
        progress_bar(len(scenes), "clips", unit="clip") as bar,
    ):
        for scene in scenes:
            frames = render(scene, size=size)
            record = describe(scene, frames)
            target = out / record["file"]
            if known.get(target.name) is None or known[target.name] != _hash_of(target):
                encode(frames, target, codec_of(scene))
                checksums.write(f"{_hash_of(target)}  {target.name}\n")
                checksums.flush()
            lines.append(_line(record))
            bar.update()
    _replace(out / CHECKSUMS, "".join(f"{_hash_of(out / f)}  {f}\n" for f in _files(scenes)))
    _replace(out / MANIFEST, "".join(lines))
    return out / MANIFEST


def codec_of(scene: Scene) -> str:
    """Return how a clip is coded: as training clips are, but in ``ood`` as none of them is."""
    return _OOD_CODECS[scene.index % len(_OOD_CODECS)] if scene.split == "ood" else "libx264"


def encode(frames: npt.NDArray[np.uint8], target: Path, codec: str = "libx264") -> None:
    """Write frames (t, h, w, 3) as an all-intra mp4 file; ``target`` appears complete or not at all.

    Colour is kept at full resolution (4:4:4): at half of it a digit's path is no longer smooth.
    """
    import av

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = f"digit-{VERSION}"  # tells an index what the file is
            pixels, options = CODECS[codec]
            stream = container.add_stream(codec, rate=FPS)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pixels
            stream.thread_count = 1
            stream.options = dict(options)
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _claim(scenes: Sequence[Scene], out: Path, size: int) -> None:
    """Note what the folder is for, or check that it is for the same."""
    names = hashlib.sha256("\n".join(_files(scenes)).encode()).hexdigest()
    header = {"version": VERSION, "count": len(scenes), "size": size, "fps": FPS, "files": names}
    path = out / HEADER
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != header:
            raise InvalidInput(
                f"{out} already holds other clips ({path.name} differs); give an empty folder with --out"
            )
    elif any(out.iterdir()):
        raise InvalidInput(f"{out} is not empty; give a new or empty folder with --out")
    else:
        _replace(path, json.dumps(header) + "\n")


def _files(scenes: Sequence[Scene]) -> list[str]:
    return [f"{scene.clip_id}.mp4" for scene in scenes]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def _hash_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _read_checksums(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    rows = [line.split("  ", 1) for line in path.read_text().splitlines()]
    return {row[1]: row[0] for row in rows if len(row) == 2}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def freeze() -> dict[str, Any]:
    """Return what pins this version of the world; ``eval/protocols/world.yaml`` holds it under ``freeze``.

    Manifests: hash of the first 200 clips of seed 0 of every split, as ``manifest_hash`` takes it. Frames:
    hash of the 8 sampled frames of the first 20. Ceilings: of the first 500 twin pairs of test, seed 0.
    """
    return {
        "version": VERSION,
        "mixture": [
            {"things": p.things, "events": list(p.slots), "train": p.train, "test": p.test} for p in PLANS
        ],
        "vocabulary": {
            "words": len(vocabulary()),
            "templates": {split: len(templates(split)) for split in ("train", "val", "test")},
            "digit_images": {name: last - first for name, (first, last) in BLOCKS.items()},
            "colours": len(COLOURS),
            "kinds": len(KINDS),
        },
        "manifests": {split: manifest_hash(gallery(split, 0, 200)) for split in FIRST_SPLITS},
        "frames": {split: _frames_hash(split) for split in FIRST_SPLITS},
        "ceilings": {
            name: {metric: round(value, 4) for metric, value in row.items()}
            for name, row in ceilings(list(gallery("test", 0, 500, twins=True))).items()
        },
    }


def freeze_ood() -> dict[str, Any]:
    """Return what pins the split ``ood``; ``eval/protocols/world-ood.yaml`` holds it under ``freeze``."""
    return {
        "version": VERSION,
        "templates": len(templates("ood")),
        "textures": NUM_OOD_TEXTURES,
        "sizes": list(OOD_SIZES),
        "codecs": list(_OOD_CODECS),
        "manifest": manifest_hash(gallery("ood", 0, 200)),
        "frames": _frames_hash("ood"),
    }


def _frames_hash(split: str) -> str:
    whole = hashlib.sha256()
    for scene in gallery(split, 0, 20):
        whole.update(render(scene, sample_frames(8)).tobytes())
    return whole.hexdigest()
