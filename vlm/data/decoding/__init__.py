"""Exact frames of any ordinary video file, still pictures, or a reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vlm.data.decoding.hardware import Device
from vlm.data.decoding.opening import DecodeLimits, Source
from vlm.data.decoding.picture import Picture, read_picture
from vlm.data.decoding.video import Frames, SegmentFrames, Video, VideoInfo

__all__ = [
    "DecodeLimits",
    "Device",
    "Frames",
    "Picture",
    "SegmentFrames",
    "Source",
    "Video",
    "VideoInfo",
    "iter_segments",
    "open_video",
    "probe",
    "read_frames",
    "read_picture",
]


def open_video(source: Source, limits: DecodeLimits | None = None, device: Device | None = None) -> Video:
    """Open a video file, or a file's bytes, and index when each of its frames is shown.

    Args:
        source: A path, or the bytes of a file.
        limits: What the video may cost.
        device: Decodes its frames if it can, the CPU if not (`Video.fallback`); the frames are the same.

    Raises:
        DataError: ``reason`` is one of ``missing``, ``not_a_file``, ``unreadable``, ``empty``,
            ``not_a_video``, ``audio_only``, ``no_video``, ``encrypted``, ``decoder_missing``, ``too_large``,
            ``no_frames``, ``timeout``.
    """
    return Video(source, limits, device)


def probe(source: Source, limits: DecodeLimits | None = None) -> VideoInfo:
    """Return what a video is: size as displayed, true frame count, times, codec.

    Raises:
        DataError: See `open_video`.
    """
    return Video(source, limits).info


def read_frames(
    source: Source,
    indices: Sequence[int] | npt.NDArray[np.int64] | None = None,
    *,
    times_s: Sequence[float] | npt.NDArray[np.float64] | None = None,
    limits: DecodeLimits | None = None,
) -> Frames:
    """Return frames by number or by time, exactly, as displayed.

    Args:
        source: A path, or the bytes of a file.
        indices: Frame numbers in display order, any order, repeats allowed.
        times_s: Instead of numbers: seconds from the first frame; the frame on screen then is returned.
        limits: What the video may cost.

    Returns:
        (t, h, w, 3) uint8 RGB.

    Raises:
        ValueError: Not exactly one of ``indices`` and ``times_s`` is given, or an index is out of range.
        DataError: See `open_video`; also ``truncated`` and ``pixel_format``.
    """
    if (indices is None) == (times_s is None):
        raise ValueError("expected either indices or times_s")
    video = Video(source, limits)
    if times_s is not None:
        return video.read(video.frames_at(times_s))
    assert indices is not None
    return video.read(indices)


def iter_segments(
    source: Source,
    segments: Sequence[tuple[float, float]],
    frames_per_segment: int,
    limits: DecodeLimits | None = None,
) -> Iterator[SegmentFrames]:
    """Yield the sampled frames of each [start_s, end_s) of a video, decoding each stretch at most once.

    Raises:
        ValueError: A segment is empty.
        DataError: See `open_video`.
    """
    return Video(source, limits).iter_segments(segments, frames_per_segment)
