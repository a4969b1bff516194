"""Whether a browser can play a file, and stretches of those it cannot, made playable; in the media worker."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from vlm.data.decoding import DecodeLimits, Video, open_video
from vlm.data.decoding.opening import open_container, source_name, video_stream
from vlm.errors import DataError
from vlm.serving.media.pictures import pixel_shape

_LIMITS = DecodeLimits(max_seconds=60)
_SHORT_SIDE = 720
_SAMPLE_RATE = 48_000
_TICKS = 90_000
_PLAIN_PIXELS = frozenset({"yuv420p", "yuvj420p"})
# what browsers decode inside each container: video, sound, and the media type to say
_MP4 = ({"h264", "av1", "vp9"}, {"aac", "mp3", "opus", "flac"}, "video/mp4")
_WEBM = ({"vp8", "vp9", "av1"}, {"opus", "vorbis"}, "video/webm")


def describe(path: str) -> dict[str, Any]:
    """Return how a browser can be given a file: ``play`` is ``direct``, ``remux`` or ``transcode``.

    Also ``content_type``: of the file itself if ``direct``, else of what is made from it.

    Raises:
        DataError: See `vlm.data.decoding.open_video`.
    """
    with open_container(path, _LIMITS) as container:
        stream = video_stream(container, source_name(path), _LIMITS)
        formats = set(container.format.name.split(","))
        video, pixels = stream.codec_context.name, stream.codec_context.pix_fmt
        sounds = {
            audio.codec_context.name.removesuffix("float")
            for audio in container.streams.audio
            if audio.codec_context
        }
    codec = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}.get(video, video)
    plain = pixels in _PLAIN_PIXELS
    fitting = [kind for videos, audio, kind in (_WEBM, _MP4) if plain and codec in videos and sounds <= audio]
    own = "video/mp4" if "mp4" in formats else "video/webm" if _is_webm(path) else None
    if own in fitting:
        return {"play": "direct", "content_type": own}
    if fitting and "matroska" in formats:
        return {"play": "remux", "content_type": fitting[0]}
    return {"play": "transcode", "content_type": "video/mp4"}


def cut(path: str, start_s: float, end_s: float, out: Path, how: str) -> dict[str, Any]:
    """Write a stretch of a video as a file that browsers play.

    Args:
        path: The video.
        start_s: Seconds from the first frame.
        end_s: The same; the first frame that is left out.
        out: Where it is written.
        how: ``mp4`` or ``webm`` copies the streams, from the keyframe before the start; ``transcode`` encodes
            H.264 with a short side of at most 720 pixels.

    Returns:
        ``offset_s``: the video's time at which the file begins.

    Raises:
        DataError: See `vlm.data.decoding.open_video`; also ``clip_failed``.
    """
    try:
        if how == "transcode":
            return {"offset_s": _transcode(path, start_s, end_s, out)}
        return {"offset_s": _copy(path, start_s, end_s, out, how)}
    except (FFmpegError, ValueError) as error:
        raise DataError(f"{path}: this stretch cannot be made playable ({error})", "clip_failed") from error


def _is_webm(path: str) -> bool:
    with open(path, "rb") as file:
        return b"webm" in file.read(64)


def _copy(path: str, start_s: float, end_s: float, out: Path, kind: str) -> float:
    with (
        open_container(path, _LIMITS) as source,
        av.open(str(out), "w", format=kind, options=_fast(kind)) as target,
    ):
        stream = video_stream(source, source_name(path), _LIMITS)
        first = stream.start_time or 0
        tick = float(stream.time_base)
        streams = {stream.index: target.add_stream_from_template(stream, opaque=True)}
        for audio in source.streams.audio[:1]:
            streams[audio.index] = target.add_stream_from_template(audio, opaque=True)
        source.seek(first + round(start_s / tick), stream=stream, backward=True)
        taken, base = _packets(
            source, [source.streams[index] for index in streams], stream, first * tick + end_s
        )
        for packet in taken:
            shift = round(base / float(packet.time_base))
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    return max(0.0, base - first * tick)


def _packets(source: Any, streams: list[Any], main: Any, end_s: float) -> tuple[list[Any], float]:
    """Return the packets up to a time of the container, and the time of the first picture among them."""
    taken: list[Any] = []
    base: float | None = None
    for packet in source.demux(streams):
        if not packet.size or packet.pts is None:
            continue
        time_base = float(packet.time_base)
        if packet.stream is main:
            if base is None:
                base = packet.pts * time_base
            if packet.dts is not None and packet.dts * time_base >= end_s:
                break
        # sound and leading pictures from before the first picture would begin at negative times
        if base is not None and packet.pts * time_base >= base:
            taken.append(packet)
    if base is None:
        raise ValueError("no packets there")
    # Matroska stores no decoding times, and the demuxer leaves the first ones out. The sorted times, all
    # moved back by one delay, are times at which every picture is decoded before it is shown.
    pictures = [packet for packet in taken if packet.stream is main]
    shown = sorted(packet.pts for packet in pictures)
    delay = max(time - packet.pts for time, packet in zip(shown, pictures, strict=True))
    for time, packet in zip(shown, pictures, strict=True):
        packet.dts = time - delay
    return [packet for packet in taken if packet.dts is not None], base


def _transcode(path: str, start_s: float, end_s: float, out: Path) -> float:
    with (
        open_video(path, _LIMITS) as video,
        av.open(str(out), "w", format="mp4", options=_fast("mp4")) as target,
    ):
        times = video.times_s
        first = int(video.frames_at([start_s])[0])
        wanted = np.arange(first, max(first + 1, int(np.searchsorted(times, end_s - 1e-6))))
        stream = _add_video(target, video, pixel_shape(path, video.info.width))
        sound = target.add_stream("aac", rate=_SAMPLE_RATE, layout="stereo") if video.info.has_audio else None
        # the frame on screen at the start may have come before it
        starts = np.maximum(times[wanted] - start_s, 0.0)
        ticks = np.maximum.accumulate(np.round(starts * _TICKS).astype(np.int64) - np.arange(len(wanted)))
        for number, (_, pixels) in enumerate(video.iterate(wanted)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = int(ticks[number]) + number, Fraction(1, _TICKS)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
        if sound is not None:
            for frame in _sound(path, start_s + video.info.start_s, end_s + video.info.start_s):
                target.mux(sound.encode(frame))
            target.mux(sound.encode(None))
    return start_s


def _add_video(target: Any, video: Video, shape: float) -> Any:
    width, height = video.info.width * shape, video.info.height
    scale = min(1.0, _SHORT_SIDE / min(width, height))
    rate = Fraction(min(max(video.info.fps, 1.0), 120.0)).limit_denominator(1001)
    stream = target.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "23"})
    stream.width, stream.height = (max(2 * round(side * scale / 2), 2) for side in (width, height))
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, _TICKS)
    return stream


def _sound(path: str, start_s: float, end_s: float) -> Iterator[Any]:
    """Yield the sound between two times of the container, from 0; a damaged rest is silence."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=_SAMPLE_RATE)
    with open_container(path, _LIMITS) as source:
        stream = source.streams.audio[0]
        try:
            source.seek(int(max(0.0, start_s - 0.5) * av.time_base), backward=True)
            position: int | None = None
            for frame in source.decode(stream):
                if frame.time is None or frame.time + frame.samples / frame.sample_rate <= start_s:
                    continue
                if frame.time >= end_s:
                    return
                if position is None:
                    position = max(0, round((frame.time - start_s) * _SAMPLE_RATE))
                frame.pts = None
                for piece in resampler.resample(frame):
                    piece.pts, piece.time_base = position, Fraction(1, _SAMPLE_RATE)
                    position += piece.samples
                    yield piece
        except FFmpegError:
            return


def _fast(kind: str) -> dict[str, str]:
    """Options that put an mp4's index first, so that playing begins before all of it has come."""
    return {"movflags": "+faststart"} if kind == "mp4" else {}
