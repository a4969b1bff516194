"""Still pictures of a video at some times, side by side in one JPEG; runs in the media worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlm.data.decoding import DecodeLimits, Frames, open_video
from vlm.data.decoding.opening import open_container, video_stream
from vlm.data.decoding.video import as_displayed

_SEEKABLE = frozenset({"mov", "matroska", "webm"})
_LONGEST_WALK = 1500
_QUALITY = 82
_ODDEST = 5.0


def save_strip(path: str, times_s: Sequence[float], width: int, out: Path) -> dict[str, Any]:
    """Write the frames on screen at ascending times as equal cells in a row.

    Args:
        path: The video.
        times_s: Seconds from the first frame.
        width: Of one cell, in pixels; its height is 9/16 of it. A video of another shape is shown whole, on a
            dark and blurred copy of itself.
        out: Where the JPEG is written.

    Returns:
        ``width`` and ``height`` of the whole picture.

    Raises:
        DataError: See `vlm.data.decoding.open_video`.
    """
    height = round(width * 9 / 16)
    strip = Image.new("RGB", (width * len(times_s), height))
    for number, pixels in enumerate(_frames(path, times_s)):
        frame = Image.fromarray(pixels)
        if number == 0:
            shape = pixel_shape(path, frame.width)
        frame = frame.resize((max(1, round(frame.width * shape)), frame.height)) if shape != 1 else frame
        strip.paste(_cell(frame, (width, height)), (number * width, 0))
    strip.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return {"width": strip.width, "height": strip.height}


def pixel_shape(path: str, width: int) -> float:
    """Return how many times wider than high a video's pixels are to be shown, 1 for most videos.

    Args:
        path: The video.
        width: Of its frames as displayed, in pixels; tells whether they are turned.
    """
    with open_container(path, DecodeLimits()) as container:
        stream = video_stream(container, path, DecodeLimits())
        ratio = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
        is_turned = width != stream.codec_context.width
    if not 1 / _ODDEST <= ratio <= _ODDEST:
        return 1.0
    return 1 / ratio if is_turned else ratio


def _cell(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    whole = ImageOps.contain(frame, size, Image.Resampling.BICUBIC)
    if whole.size == size:
        return whole
    # blurring a small copy costs little, and growing it again blurs once more
    small = ImageOps.fit(frame, (size[0] // 8, size[1] // 8), Image.Resampling.BILINEAR)
    blurred = small.filter(ImageFilter.GaussianBlur(3)).resize(size, Image.Resampling.BICUBIC)
    cell = ImageEnhance.Brightness(blurred).enhance(0.45)
    cell.paste(whole, ((size[0] - whole.width) // 2, (size[1] - whole.height) // 2))
    return cell


def _frames(path: str, times_s: Sequence[float]) -> list[Frames]:
    try:
        found = _sought(path, times_s)
    except (FFmpegError, ValueError):
        found = []
    if len(found) == len(times_s):
        return found
    # formats whose times or seeking cannot be trusted: the slow way, which reads the whole file's packets
    with open_video(path, DecodeLimits(max_seconds=30)) as video:
        return list(video.read(video.frames_at(times_s)))


def _sought(path: str, times_s: Sequence[float]) -> list[Frames]:
    """Return the frames by seeking once and decoding on; fewer if the file's times do not hold."""
    limits = DecodeLimits()
    found: list[Frames] = []
    with open_container(path, limits) as container:
        if not _SEEKABLE & set(container.format.name.split(",")):
            return []
        stream = video_stream(container, path, limits)
        tick = float(stream.time_base)
        first = stream.start_time or 0
        container.seek(first + round(times_s[0] / tick), stream=stream, backward=True)
        before: Any = None
        for walked, frame in enumerate(container.decode(stream)):
            if frame.pts is None or walked > _LONGEST_WALK:
                break
            time_s = (frame.pts - first) * tick
            while len(found) < len(times_s) and time_s > times_s[len(found)] + 1e-6:
                if before is None and time_s > times_s[0] + 1.0:
                    return []
                found.append(as_displayed(before if before is not None else frame, path))
            before = frame
            if len(found) == len(times_s):
                break
        if before is not None and walked <= _LONGEST_WALK:
            # the last frame stays on screen to the end
            found += [as_displayed(before, path)] * (len(times_s) - len(found))
    return found


def strip_times(start_s: float, end_s: float, count: int) -> list[float]:
    """Return `count` times that divide [start_s, end_s) evenly, each in the middle of its part."""
    return [float(time) for time in start_s + (end_s - start_s) * (np.arange(count) + 0.5) / count]
