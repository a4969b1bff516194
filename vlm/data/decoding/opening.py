"""Open a file or bytes as a video and nothing else: regular files, allowed formats, bounded sizes."""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from vlm.errors import DataError

Source = str | os.PathLike[str] | bytes

# Demuxers that read nothing but the file they are given. Playlists, image sequences and concatenation
# scripts are absent because they open other files; so are devices and subtitles.
VIDEO_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,ogg,asf,gif,apng,rm,mxf,dv,nut,wtv,"
    "ivf,av1,obu,h264,hevc,vvc,h263,m4v,mjpeg,yuv4mpegpipe"
)
PICTURE_FORMATS = "jpeg_pipe,png_pipe,webp_pipe"
_PROBE_BYTES = "10000000"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What one video may cost before it is refused.

    Attributes:
        max_pixels: Largest width x height of a frame.
        max_seconds: Longest time that opening, or one call that reads frames, may take.
        max_result_bytes: Largest array that one call returns.
    """

    max_pixels: int = 7680 * 4320
    max_seconds: float = 300.0
    max_result_bytes: int = 4 << 30


class Deadline:
    """A wall-clock limit that is asked now and then."""

    def __init__(self, seconds: float, name: str) -> None:
        self._seconds, self._name = seconds, name
        self.restart()

    def restart(self) -> None:
        """Start counting again from zero."""
        self._end = time.monotonic() + self._seconds

    def pause(self) -> None:
        """Stop counting while somebody else works."""
        self._left = self._end - time.monotonic()

    def resume(self) -> None:
        """Count on after a pause."""
        self._end = time.monotonic() + self._left

    def check(self) -> None:
        """Raise DataError (``timeout``) if the time is over."""
        if time.monotonic() > self._end:
            raise DataError(f"{self._name}: decoding took longer than {self._seconds:g} s", "timeout")


def source_name(source: Source) -> str:
    """Return how messages call the source; control characters in names are escaped."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes in memory"
    text = os.fspath(source)
    return text if text.isprintable() else ascii(text)


def check_source(source: Source) -> None:
    """Raise DataError unless the source is a non-empty regular file or non-empty bytes."""
    name = source_name(source)
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            found = os.stat(source)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: no such video file: {error}", "missing") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{name}: expected a regular file", "not_a_file")
        if not os.access(source, os.R_OK):
            raise DataError(f"{name}: permission denied", "unreadable")
        size = found.st_size
    if size == 0:
        raise DataError(f"{name}: the file is empty (0 bytes)", "empty")


@contextmanager
def open_container(source: Source, limits: DecodeLimits, formats: str = VIDEO_FORMATS) -> Iterator[Any]:
    """Open the source as an ``av`` input container of one of ``formats`` and close it afterwards.

    Raises:
        DataError: It is in none of them (``not_a_video``).
    """
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": formats,
        "max_pixels": str(limits.max_pixels),
        "probesize": _PROBE_BYTES,
    }
    name = source_name(source)
    handle: Any = None
    try:
        if isinstance(source, bytes):
            handle, options["protocol_whitelist"] = io.BytesIO(source), ""
            target: Any = handle
        else:
            target = f"file:{Path(os.path.abspath(source))}"
            try:
                target.encode("utf-8")
            except UnicodeEncodeError:  # a name that is not UTF-8 cannot be handed to FFmpeg
                target = handle = open(source, "rb")  # noqa: SIM115 - closed below
        try:
            container = av.open(target, metadata_errors="ignore", options=options)
        except (FFmpegError, OSError, ValueError) as error:
            detail = f"{type(error).__name__}"
            raise DataError(f"{name}: not a video in a known format ({detail})", "not_a_video") from error
        try:
            yield container
        finally:
            container.close()
    finally:
        if handle is not None:
            handle.close()


def video_stream(container: Any, name: str, limits: DecodeLimits) -> Any:
    """Return the main video stream, its decoder ready on one thread.

    Raises:
        DataError: There is none (``audio_only``, ``no_video``), or it is ``encrypted``, has no decoder
            (``decoder_missing``) or frames beyond the limit (``too_large``).
    """
    pictures = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        reason = "audio_only" if container.streams.audio else "no_video"
        raise DataError(f"{name}: holds no video stream", reason)
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    context = stream.codec_context
    if context is None:
        raise DataError(f"{name}: FFmpeg has no decoder for this video stream", "decoder_missing")
    if "enc_key_id" in stream.metadata or context.codec_tag in ("encv", "drmi"):
        raise DataError(f"{name}: the video is encrypted", "encrypted")
    if context.width * context.height > limits.max_pixels:
        raise DataError(
            f"{name}: frames of {context.width}x{context.height} exceed {limits.max_pixels} pixels",
            "too_large",
        )
    # one thread: the caller runs several videos at once, and skipping frames needs a decoder in step
    context.thread_count = 1
    context.options = {"max_pixels": str(limits.max_pixels)}
    return stream
