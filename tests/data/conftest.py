"""Videos whose frames carry their own number, painted in: a wrong frame cannot pass for the right one."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS = 10


def paint(number: int, width: int, height: int) -> np.ndarray:
    """A frame (h, w, 3): its number as a row of black and white blocks at the top, colour below."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:] = (60 + number * 7 % 120, 90, 200 - number * 5 % 120)
    block = width // BITS
    for bit in range(BITS):
        frame[: height // 2, bit * block : (bit + 1) * block] = 255 if number >> bit & 1 else 0
    return frame


def painted_number(frame: np.ndarray) -> int:
    """Read back what ``paint`` painted."""
    height, width = frame.shape[:2]
    block = width // BITS
    middle = [frame[height // 4, bit * block + block // 2].mean() > 127 for bit in range(BITS)]
    return sum(1 << bit for bit, is_set in enumerate(middle) if is_set)


def write_video(
    target: Path | io.BytesIO,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    container: str | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 1000),
    fps: int = 25,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    **options: str,
) -> None:
    """Encode frames; ``pts`` in ticks of ``time_base``, else evenly at ``fps``."""
    height, width = frames[0].shape[:2]
    with av.open(str(target) if isinstance(target, Path) else target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        if pts is not None:
            stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is None:
                frame.pts, frame.time_base = number, Fraction(1, fps)
            else:
                frame.pts, frame.time_base = pts[number], time_base
            for packet in stream.encode(frame):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)


def write_audio(target: Path) -> None:
    """A file with a second of sound and no picture."""
    with av.open(str(target), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)


@pytest.fixture(scope="session")
def numbered() -> Callable[..., list[np.ndarray]]:
    """``numbered(n, width, height)``: frames 0 .. n-1, painted."""
    return lambda count, width=160, height=64: [paint(number, width, height) for number in range(count)]


@pytest.fixture(scope="session")
def read_number() -> Callable[[np.ndarray], int]:
    """Reads the painted number of a frame."""
    return painted_number


@pytest.fixture(scope="session")
def encode() -> Callable[..., None]:
    """``encode(path, frames, **how)``: see ``write_video``."""
    return write_video


@pytest.fixture(scope="session")
def encode_audio() -> Callable[[Path], None]:
    """Writes a file without a picture."""
    return write_audio


# name: (file name, number of frames, how to encode); together they hold what breaks naive readers
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("a.mp4", 60, {"g": "12"}),
    "b-frames": ("a.mp4", 90, {"bf": "3", "g": "30", "x264-params": "b-pyramid=normal:scenecut=0"}),
    "one-key": ("a.mp4", 80, {"g": "250", "bf": "3", "x264-params": "scenecut=0"}),
    "open-gop": ("a.mp4", 90, {"g": "15", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "open-gop-mkv": ("a.mkv", 90, {"g": "15", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "variable-rate": (
        "a.mp4", 60, {"pts": [n * n + 20 * n for n in range(60)], "g": "10", "bf": "2"},
    ),
    "late-start": ("a.mkv", 40, {"pts": [7000 + 40 * n for n in range(40)], "g": "8"}),
    "long-gap": ("a.mp4", 30, {"pts": [40 * n + (5000 if n > 14 else 0) for n in range(30)], "g": "10"}),
    "one-frame": ("a.mp4", 1, {}),
    "odd-size": ("a.mkv", 12, {"pix_fmt": "yuv444p", "size": (161, 67)}),
    "transport": ("a.ts", 60, {"g": "15", "bf": "2"}),
    "avi-b-frames": ("a.avi", 60, {"g": "20", "bf": "2"}),
    "avi-mpeg4": ("a.avi", 40, {"codec": "mpeg4", "b": "2M", "g": "10"}),
    "programme": ("a.mpg", 40, {"codec": "mpeg2video", "b": "3M", "g": "10", "bf": "2"}),
    "raw": ("a.h264", 40, {"g": "10", "bf": "2", "container": "h264"}),
    "flash": ("a.flv", 40, {"codec": "flv", "b": "2M", "g": "10"}),
    "vp9": ("a.webm", 40, {"codec": "libvpx-vp9", "b": "1M", "g": "10", "deadline": "realtime",
                           "cpu-used": "8"}),
    "hevc": ("a.mp4", 50, {"codec": "libx265", "preset": "ultrafast",
                           "x265-params": "log-level=none:bframes=3:keyint=16:pools=none"}),
    "gif": ("a.gif", 20, {"codec": "gif", "pix_fmt": "rgb8", "fps": 10}),
    "fragmented": ("a.mp4", 60, {"g": "12", "bf": "2", "movflags": "frag_keyframe+empty_moov"}),
}  # fmt: skip


@pytest.fixture(scope="session", params=sorted(KINDS))
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[np.ndarray]]:
    """Each kind of video in turn: its name, file and frames as they were before encoding."""
    file, count, how = KINDS[request.param]
    how = dict(how)
    width, height = how.pop("size", (160, 64))
    if how.get("codec", "libx264") == "libx264":
        how = {"preset": "ultrafast", "qp": "10", **how}
    frames = [paint(number, width, height) for number in range(count)]
    path = tmp_path_factory.mktemp("kind") / file
    write_video(path, frames, **how)
    return request.param, path, frames


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary small mp4 of 40 numbered frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, [paint(n, 160, 64) for n in range(40)], preset="ultrafast", g="10", bf="2")
    return path
