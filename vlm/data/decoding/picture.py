"""A still picture, decoded whole or refused: the same demands as of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from vlm.data.decoding.opening import (
    PICTURE_FORMATS,
    Deadline,
    DecodeLimits,
    Source,
    check_source,
    open_container,
    source_name,
    video_stream,
)
from vlm.data.decoding.timeline import packets
from vlm.data.decoding.video import as_displayed
from vlm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A decoded picture.

    Attributes:
        frame: (h, w, 3) uint8 RGB, as displayed; transparency is dropped.
        codec: FFmpeg's name, such as ``mjpeg``, ``png`` or ``webp``.
    """

    frame: npt.NDArray[np.uint8]
    codec: str


def read_picture(source: Source, limits: DecodeLimits | None = None) -> Picture:
    """Decode a JPEG, PNG or WebP file, or a file's bytes; of a moving one the first frame.

    A turn that EXIF asks for is made. The four orientations that mirror, which no camera writes, cannot be
    told from turns and come out mirrored the wrong way.

    Raises:
        DataError: ``reason`` is one of ``missing``, ``not_a_file``, ``unreadable``, ``empty``,
            ``not_a_picture``, ``decoder_missing``, ``too_large``, ``damaged``, ``pixel_format``, ``timeout``.
    """
    limits, name = limits or DecodeLimits(), source_name(source)
    check_source(source)
    try:
        with open_container(source, limits, PICTURE_FORMATS) as container:
            stream = video_stream(container, name, limits)
            # half a picture with the rest in grey is not a picture
            stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
            frame = _first_frame(container, stream, Deadline(limits.max_seconds, name))
            codec: str = stream.codec_context.name
    except DataError as error:
        reason = {"not_a_video": "not_a_picture", "no_video": "not_a_picture"}.get(error.reason, error.reason)
        raise DataError(str(error).replace("not a video", "not a picture"), reason) from error
    if frame is None:
        raise DataError(
            f"{name}: the picture is damaged, cut off, or larger than {limits.max_pixels} pixels", "damaged"
        )
    return Picture(frame=as_displayed(frame, name), codec=codec)


def _first_frame(container: Any, stream: Any, deadline: Deadline) -> Any:
    try:
        for packet in packets(container, stream, deadline):
            for frame in stream.codec_context.decode(packet):
                return frame
        return next(iter(stream.codec_context.decode(None)), None)
    except (FFmpegError, ValueError):
        return None
