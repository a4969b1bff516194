"""Decoding on the GPU beside the CPU: the same frames, and how many a second. As a program it decodes a clip.

Each decoding is a process of its own, because PyTorch holds this one's CUDA context in its own way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from gpu.session import Figures, Session

# name: encoder, pixel format, options; what an encoder of this PyAV does not know is left out, and said
CLIPS = {
    "h264": ("libx264", "yuv420p", {"preset": "ultrafast", "bf": "3"}),
    "hevc": ("libx265", "yuv420p", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "hevc 10 bit": ("libx265", "yuv420p10le", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "b": "4M", "row-mt": "1"}),
    "av1": ("libsvtav1", "yuv420p", {"preset": "12"}),
}
_FPS = 25
_TIMEOUT_S = 120.0


def decoding(session: Session) -> Figures:
    """Decode clips by the GPU and the CPU; every frame must be the same, and the GPU must have decoded it."""
    device = "cuda" if session.device.is_gpu else "cpu"
    try:
        from vlm.errors import InvalidInput
        from vlm.retrieval.ingest.pool import check_device

        check_device(device)
    except (ImportError, InvalidInput) as error:
        print(f"decoding: left out: {error}", flush=True)
        return {"left_out": str(error)}
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in session.shared_out(list(CLIPS)):
            if not session.left_s():
                found[name] = {"error": "no time left"}
                continue
            clip = Path(folder) / f"{name.replace(' ', '-')}.mkv"
            try:
                _write(clip, *CLIPS[name], session.is_small)
            except (ValueError, OSError) as error:  # PyAV's errors are both
                found[name] = {"error": f"no clip: {error}"}
            else:
                found[name] = _compared(session, name, clip, device)
            if "error" in found[name]:
                print(f"decoding {name}: {found[name]['error']}", flush=True)
    return found


def _compared(session: Session, name: str, clip: Path, device: str) -> Figures:
    row: Figures = {}
    for way in dict.fromkeys(("cpu", device)):
        row[way] = _in_a_process(clip, way)
        if "error" in row[way]:
            session.is_broken = True
            return {"error": f"{way}: {row[way]['error']}", **row}
    mine, truth = row[device], row["cpu"]
    if mine["fallback"]:
        session.is_broken = True
        print(f"decoding {name}: the CPU had to: {mine['fallback']}", flush=True)
    row["difference"] = _difference(clip, device)
    if mine["sha256"] != truth["sha256"]:
        session.wrong(f"decoding {name}: frames differ by up to {row['difference']} of 255")
    row["workers"] = _by_workers(clip, device)
    if row["workers"]["fallbacks"]:
        session.is_broken = True
        print(f"decoding {name}: in workers the CPU had to: {row['workers']['fallbacks']}", flush=True)
    elif not row["workers"]["is_same"]:
        session.wrong(f"decoding {name}: segments of workers differ")
    print(
        f"decoding {name}: {device} {mine['all_fps']:.0f} frames a second, {mine['few_fps']:.0f} go by where "
        f"one in {_FPS} is wanted; cpu {truth['all_fps']:.0f} and {truth['few_fps']:.0f}",
        flush=True,
    )
    return row


def _in_a_process(clip: Path, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(clip), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {_TIMEOUT_S:g} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {done.stderr[-300:]}"}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _difference(clip: Path, device: str) -> int:
    """Return the largest difference between the frames that both processes kept."""
    ours, theirs = (np.load(_kept(clip, way)).astype(np.int16) for way in (device, "cpu"))
    return int(np.abs(ours - theirs).max())


def _by_workers(clip: Path, device: str) -> Figures:
    """Decode as indexing does, in processes whose memory is limited."""
    from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Finished
    from vlm.retrieval.ingest.pool import decode_files
    from vlm.types import Preprocessing

    preprocessing = Preprocessing(num_frames=8, image_size=224)
    segments, fallbacks = {}, []
    for way in dict.fromkeys(("cpu", device)):
        settings = DecodeSettings(preprocessing=preprocessing, segment_s=2, stride_s=1, decode_with=way)
        events = list(decode_files([clip], settings))
        segments[way] = [event.video.tobytes() for event in events if isinstance(event, DecodedSegment)]
        ends = [event for event in events if isinstance(event, Finished)]
        fallbacks += [end.fallback for end in ends if end.fallback] if ends else ["failed"]
    is_same = segments["cpu"] == segments[device] and bool(segments["cpu"])
    return {"is_same": is_same, "fallbacks": fallbacks}


def _write(clip: Path, encoder: str, layout: str, options: dict[str, str], is_small: bool) -> None:
    """Write a clip of noise that moves, with a key frame every two seconds."""
    import av

    width, height, count = (64, 48, 2 * _FPS) if is_small else (1280, 720, 12 * _FPS)
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    picture = coarse.repeat(16, 0).repeat(16, 1)
    priority = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(str(clip), "w") as container:
        stream = container.add_stream(encoder, rate=_FPS, options={"g": str(2 * _FPS), **options})
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        for number in range(count):
            shown = np.roll(picture, (3 * number, 5 * number), (0, 1))
            shown[: height // 4] = generator.integers(0, 256, (1, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, "rgb24")))
        container.mux(stream.encode(None))
    # SVT-AV1 takes real-time priority where it may, and keeps it: nothing beside it would be timed fairly
    os.sched_setscheduler(0, *priority)


def _kept(clip: Path, device: str) -> Path:
    return clip.with_name(f"{clip.stem}.{device}.npy")


def main() -> int:
    """Decode one clip, all frames and then one in 25; print what came and how fast, keep a few frames."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("device", help="cpu, cuda, ...")
    arguments = parser.parse_args()
    from vlm.data.decoding import Device, open_video

    begin = time.perf_counter()
    device = None if arguments.device == "cpu" else Device(arguments.device)
    opening_s = time.perf_counter() - begin
    video = open_video(arguments.clip, device=device)
    count = video.info.num_frames
    video.read([0])  # what is loaded once is not counted
    kept, digest = [], hashlib.sha256()
    begin = time.perf_counter()
    spent_s = 0.0
    for index, frame in video.iterate(range(count)):
        before = time.perf_counter()
        digest.update(frame.data)
        if index % (count // 5) == 0:
            kept.append(frame)
        spent_s += time.perf_counter() - before
    all_s = time.perf_counter() - begin - spent_s
    begin = time.perf_counter()
    video.read(range(0, count, _FPS))
    few_s = time.perf_counter() - begin
    np.save(_kept(arguments.clip, arguments.device), np.stack(kept))
    result = {
        "frames": count,
        "sha256": digest.hexdigest(),
        "fallback": video.fallback,
        "opening_s": opening_s,
        "all_fps": count / all_s,
        "few_fps": count / few_s,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
