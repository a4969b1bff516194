"""An opened video: what it is, and any of its frames, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from vlm.data.decoding.hardware import Device, DeviceError
from vlm.data.decoding.opening import (
    Deadline,
    DecodeLimits,
    Source,
    check_source,
    open_container,
    source_name,
    video_stream,
)
from vlm.data.decoding.timeline import (
    Timeline,
    decode_all,
    decode_packet,
    index_frames,
    index_packets,
    packets,
)
from vlm.data.frame_sampling import segment_frames
from vlm.errors import DataError

Frames = npt.NDArray[np.uint8]
# codecs whose unreferenced frames can be skipped without changing the others (false for AV1)
_SKIPPABLE = frozenset({"h264", "hevc"})
_SHORT_WALK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Facts about a video that were checked by opening it and decoding its first frame.

    Attributes:
        duration_s: From the first frame's start to the last frame's end.
        num_frames: Frames that can be addressed.
        fps: Mean rate.
        width: Pixels, as displayed (after rotation).
        height: Pixels, as displayed.
        rotation: Degrees clockwise that display turns the coded picture: 0, 90, 180 or 270.
        is_variable: The gaps between frames differ by more than a tenth of the usual gap.
        codec: FFmpeg's name, such as ``h264``.
        container: FFmpeg's name, such as ``mov,mp4,m4a,3gp,3g2,mj2``.
        pixel_format: FFmpeg's name, such as ``yuv420p``.
        start_s: Container time of the first frame; all other times here count from it.
        has_audio: Whether there is an audio stream.
    """

    duration_s: float
    num_frames: int
    fps: float
    width: int
    height: int
    rotation: int
    is_variable: bool
    codec: str
    container: str
    pixel_format: str
    start_s: float
    has_audio: bool


class SegmentFrames(NamedTuple):
    """Frames of one segment: its number in the request, (t, h, w, 3) uint8 RGB, their (t,) seconds."""

    number: int
    frames: Frames
    times_s: npt.NDArray[np.float64]


class Video:
    """A video open for reading; use it from one thread, as a context manager or until garbage collected.

    Nothing stays open between calls, so holding many is cheap.

    Attributes:
        info: What it is.
        fallback: Why the CPU decoded frames of it though a device was to; empty if it did not. It is a reason
            of `DeviceError`, ``no_times`` (packets do not tell which frame is which) or ``frames_missing``.

    Raises:
        DataError: See `open_video`.
    """

    def __init__(
        self, source: Source, limits: DecodeLimits | None = None, device: Device | None = None
    ) -> None:
        self._source, self._limits, self._device = source, limits or DecodeLimits(), device
        self._name = source_name(source)
        self._deadline = Deadline(self._limits.max_seconds, self._name)
        self._reference: Timeline | None = None
        self.fallback = ""
        check_source(source)
        with open_container(source, self._limits) as container:
            stream = video_stream(container, self._name, self._limits)
            timeline, first = index_packets(container, stream, self._deadline)
        if timeline is None:
            timeline, first = self._decode_timeline()
        if first is None:
            raise DataError(f"{self._name}: no frame can be decoded", "no_frames")
        self._timeline = timeline
        self._coded_size = (first.width, first.height)
        self._quarter_turns = _quarter_turns(first)
        self.info = self._describe(container, stream, first)

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def times_s(self) -> npt.NDArray[np.float64]:
        """(n,) seconds from the first frame at which each frame appears."""
        return self._timeline.times_s()

    def frames_at(self, times_s: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return the index of the frame on screen at each time, clipped to the video."""
        found = np.searchsorted(self.times_s, np.asarray(times_s, np.float64) + 1e-6, side="right")
        return np.clip(found - 1, 0, len(self._timeline.pts) - 1)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Frames:
        """Return the frames at ``indices`` (any order, repeats allowed) as (t, h, w, 3) uint8 RGB.

        Raises:
            ValueError: An index is outside [0, num_frames), or the result would be too large.
            DataError: Nothing could be decoded, or it took too long.
        """
        wanted = np.asarray(indices, np.int64).reshape(-1)
        shape = (len(wanted), self.info.height, self.info.width, 3)
        if np.prod(shape, dtype=np.float64) > self._limits.max_result_bytes:
            raise ValueError(f"{len(wanted)} frames of {self.info.width}x{self.info.height} exceed the limit")
        result = np.empty(shape, np.uint8)
        unique, inverse = np.unique(wanted, return_inverse=True)
        self._deadline.restart()
        for number, (_, frame) in enumerate(self.iterate(unique)):
            result[inverse == number] = frame
        return result

    def iterate(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[tuple[int, Frames]]:
        """Yield (index, (h, w, 3) uint8 RGB) for strictly ascending ``indices``, one frame in memory."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if len(wanted) == 0:
            return
        if wanted[0] < 0 or wanted[-1] >= self.info.num_frames or bool((np.diff(wanted) <= 0).any()):
            raise ValueError(f"expected ascending frame indices in [0, {self.info.num_frames}), got {wanted}")
        self._deadline.restart()
        done = 0
        for find in self._ways():
            for frame in find(wanted[done:]):
                yield int(wanted[done]), self._pause_for(frame)
                self._deadline.resume()
                done += 1
            if done == len(wanted):
                return
        raise DataError(f"{self._name}: frame {wanted[done]} can no longer be decoded", "truncated")

    def restart_clock(self) -> None:
        """Allow the decoding that goes on as long again as `DecodeLimits.max_seconds`; between two frames."""
        self._deadline.restart()
        self._deadline.pause()

    def iter_segments(
        self, segments: Sequence[tuple[float, float]], frames_per_segment: int
    ) -> Iterator[SegmentFrames]:
        """Yield the sampled frames of each [start_s, end_s), in the order given, decoding forward once.

        Sort the segments by start: memory then holds only the frames of overlapping ones.
        """
        times = self.times_s
        plans = [segment_frames(times, start, end, frames_per_segment) for start, end in segments]
        left: dict[int, int] = {}
        for plan in plans:
            for index in plan.tolist():
                left[index] = left.get(index, 0) + 1
        source = self.iterate(sorted(left))
        held: dict[int, Frames] = {}
        for number, plan in enumerate(plans):
            self._deadline.restart()
            while any(index not in held for index in plan.tolist()):
                index, frame = next(source)
                held[index] = frame
            yield SegmentFrames(number, np.stack([held[index] for index in plan.tolist()]), times[plan])
            for index in plan.tolist():
                left[index] -= 1
                if left[index] == 0:
                    del held[index]

    def _ways(self) -> Iterator[Callable[[npt.NDArray[np.int64]], Iterator[Any]]]:
        """Yield the ways to find frames, each of which may end early: the next goes on where it did."""
        can_walk = self._timeline.is_exact and self._reference is None
        if self._device is not None and not self.fallback:
            if can_walk:
                yield self._walk_on_device
            else:
                self.fallback = "no_times"
        if can_walk:
            yield self._walk
        yield self._count_to

    def _walk_on_device(self, wanted: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield what the device decodes; where it does not, end early, and never ask it again."""
        done = 0
        try:
            for frame in self._walk(wanted, self._device):
                yield frame
                done += 1
        except DeviceError as error:
            self.fallback = error.reason
        else:
            self.fallback = "frames_missing" if done < len(wanted) else ""

    def _walk(self, wanted: npt.NDArray[np.int64], device: Device | None = None) -> Iterator[Any]:
        """Yield the frames whose times the packets promised; end early if one does not come.

        Raises:
            DeviceError: The device cannot go on.
        """
        timeline = self._timeline
        targets = timeline.pts[wanted].tolist()
        keys = [timeline.key_of(frame) if timeline.is_seekable else 0 for frame in wanted.tolist()]
        done = 0
        with self._opened() as (container, stream):
            context = stream.codec_context
            if device is not None:
                context = device.decoder(stream, self.info.pixel_format)
            while True:
                for frame in self._decode_from(container, stream, context, keys[done], set(targets[done:])):
                    if frame.pts is None or frame.pts < targets[done]:
                        continue
                    if frame.pts > targets[done]:
                        return
                    yield frame if device is None else context.fetched(frame)
                    done += 1
                    if done == len(targets):
                        return
                    if timeline.key_position[keys[done]] > timeline.position[wanted[done - 1]] + _SHORT_WALK:
                        break
                else:
                    break
        if done < len(targets) and not self._timeline.is_seekable and timeline.is_seekable:
            yield from self._walk(wanted[done:], device)

    def _decode_from(
        self, container: Any, stream: Any, context: Any, key: int, targets: set[int]
    ) -> Iterator[Any]:
        """Decode from a key packet on (0 = the start), skipping what neither is nor serves a target."""
        timeline = self._timeline
        can_skip = context.name in _SKIPPABLE
        if key > 0:
            in_order_of_dts = "mov" in container.format.name
            offset = (timeline.key_dts if in_order_of_dts else timeline.key_pts)[key]
            container.seek(int(offset), stream=stream)
            context.flush_buffers()  # the stream's own was, one on a device was not
        for number, packet in enumerate(packets(container, stream, self._deadline)):
            if number == 0 and key > 0 and not (packet.is_keyframe and packet.pts <= timeline.key_pts[key]):
                # the container's seek table lies: read this video from its start from now on
                self._timeline = dataclasses.replace(timeline, is_seekable=False)
                return
            if can_skip:
                context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
            yield from decode_packet(context, packet)
        yield from decode_packet(context, None)

    def _count_to(self, wanted: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield frames by their number in display order, decoding from the start.

        Where packets promised a frame that does not decode, the one on screen at its time stands in.
        """
        ordinals = wanted
        if self._timeline.is_exact:
            if self._reference is None:
                self._reference, _ = self._decode_timeline()
            shown = np.searchsorted(self._reference.times_s(), self.times_s[wanted] + 1e-6, side="right") - 1
            ordinals = np.clip(shown, 0, len(self._reference.pts) - 1)
        done = 0
        with self._opened() as (container, stream):
            for number, frame in enumerate(decode_all(container, stream, self._deadline)):
                while done < len(ordinals) and ordinals[done] == number:
                    yield frame
                    done += 1
                if done == len(ordinals):
                    return

    def _decode_timeline(self) -> tuple[Timeline, Any]:
        with self._opened() as (container, stream):
            return index_frames(container, stream, self._deadline)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        with open_container(self._source, self._limits) as container:
            yield container, video_stream(container, self._name, self._limits)

    def _pause_for(self, frame: Any) -> Frames:
        """Return the frame as (h, w, 3) RGB in display orientation, and stop the clock."""
        width, height = self._coded_size
        try:
            if (frame.width, frame.height) != self._coded_size:
                frame = frame.reformat(width=width, height=height, format="rgb24")
        except (FFmpegError, ValueError) as error:
            raise _not_convertible(frame, self._name) from error
        pixels = as_displayed(frame, self._name, self._quarter_turns)
        self._deadline.pause()
        return pixels

    def _describe(self, container: Any, stream: Any, first: Any) -> VideoInfo:
        timeline, times = self._timeline, self.times_s
        gaps = np.diff(times)
        usual = float(np.median(gaps)) if len(gaps) else _single_frame_s(stream)
        duration_s = float(times[-1]) + usual
        turned = self._quarter_turns % 2 == 1
        width, height = self._coded_size
        return VideoInfo(
            duration_s=duration_s,
            num_frames=len(times),
            fps=len(times) / duration_s,
            width=height if turned else width,
            height=width if turned else height,
            rotation=90 * self._quarter_turns,
            is_variable=bool(len(gaps) and np.abs(gaps - usual).max() > 0.1 * usual),
            codec=stream.codec_context.name,
            container=container.format.name,
            pixel_format=first.format.name,
            start_s=float(timeline.pts[0] * timeline.time_base),
            has_audio=bool(container.streams.audio),
        )


def as_displayed(frame: Any, name: str, quarter_turns: int | None = None) -> Frames:
    """Return a decoded frame as (h, w, 3) RGB, turned as it says, or by so many quarter turns clockwise.

    Raises:
        DataError: ``pixel_format``.
    """
    turns = _quarter_turns(frame) if quarter_turns is None else quarter_turns
    try:
        pixels = frame.to_ndarray(format="rgb24")
    except (FFmpegError, ValueError) as error:
        raise _not_convertible(frame, name) from error
    return np.ascontiguousarray(np.rot90(pixels, -turns))


def _not_convertible(frame: Any, name: str) -> DataError:
    return DataError(f"{name}: cannot convert {frame.format.name} to RGB", "pixel_format")


def _quarter_turns(frame: Any) -> int:
    """Return how often the display turns the picture clockwise by 90 degrees."""
    degrees = getattr(frame, "rotation", 0)
    # an unreadable matrix gives the smallest integer; slanted pictures stay as they are
    return (-degrees // 90) % 4 if degrees % 90 == 0 and abs(degrees) <= 360 else 0


def _single_frame_s(stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return 1.0 / float(stream.guessed_rate or stream.average_rate or 25)
