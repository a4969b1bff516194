"""Videos made small and quick to sample: H.264 in mp4, a known short side, a keyframe at a fixed interval."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from vlm.data.decoding import Frames, Video
from vlm.errors import DataError

_TICKS = 90_000  # a second; fine enough for any frame rate, and what mp4 and MPEG use


@dataclass(frozen=True, kw_only=True, slots=True)
class Reencoding:
    """How a video is encoded anew. Sound is left out, and every frame keeps its time.

    Attributes:
        short_side: Pixels of the shorter side; smaller videos keep their size, up to one pixel to be even.
        keyframe_every: Frames from one keyframe to the next; decoding any frame starts at most so far back.
        quality: x264's constant rate factor: 0 is lossless, 51 the worst.
    """

    short_side: int = 256
    keyframe_every: int = 30
    quality: int = 20

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.keyframe_every < 1 or not 0 <= self.quality <= 51:
            raise ValueError("expected short_side >= 16, keyframe_every >= 1 and quality in [0, 51]")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) that a video of this size gets; both are even."""
        scale = min(1.0, self.short_side / min(width, height))
        return max(2 * round(width * scale / 2), 2), max(2 * round(height * scale / 2), 2)


def reencode(video: Video, how: Reencoding) -> bytes:
    """Return the whole video as the bytes of an mp4; equal input gives equal bytes.

    Raises:
        DataError: A frame cannot be decoded (see `Video.iterate`), or the encoder failed
            (``reencode_failed``).
    """
    width, height = how.size(video.info.width, video.info.height)
    ticks = np.round(video.times_s * _TICKS).astype(np.int64)
    # two frames closer than a tick would share a time, which mp4 cannot say
    ticks = np.maximum.accumulate(ticks - np.arange(len(ticks))) + np.arange(len(ticks))
    target = io.BytesIO()
    try:
        # bitexact: no version strings or times, so that a resumed pack gives the same bytes
        with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
            stream = _add_stream(output, how, width, height, video.info.fps)
            for number, pixels in video.iterate(np.arange(video.info.num_frames)):
                frame = _frame(pixels, width, height)
                frame.pts, frame.time_base = int(ticks[number]), Fraction(1, _TICKS)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    except (FFmpegError, ValueError) as error:
        raise DataError(f"the video cannot be encoded anew: {error}", "reencode_failed") from error
    return target.getvalue()


def _add_stream(output: Any, how: Reencoding, width: int, height: int, fps: float) -> Any:
    options = {
        "preset": "fast",
        "crf": str(how.quality),
        "g": str(how.keyframe_every),
        # keyframes at the interval only, and no frame that refers past one
        "x264-params": f"scenecut=0:open-gop=0:keyint={how.keyframe_every}:min-keyint={how.keyframe_every}"
        # no lookahead: at widths that 16 does not divide, x264 weighs memory there that it never wrote
        ":rc-lookahead=0:mbtree=0",
        "bf": "0",
    }
    stream = output.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.thread_count = 1  # the caller packs several videos at once
    stream.codec_context.time_base = Fraction(1, _TICKS)
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    return stream


def _frame(pixels: Frames, width: int, height: int) -> Any:
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(width=width, height=height, format="yuv420p", interpolation="BICUBIC")
