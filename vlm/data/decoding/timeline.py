"""When each frame of a video is shown, and where decoding must start to reach it.

Containers lie about frame counts and rates, so the times come from the packets themselves (a pass that
decodes nothing) or, where even those cannot be trusted, from decoding the stream once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from vlm.data.decoding.opening import Deadline

Ticks = npt.NDArray[np.int64]
_SEEKABLE = frozenset({"mov", "matroska", "webm"})
# AVI and MPEG programme streams have no reliable presentation times, raw streams none at all
_UNTIMED = frozenset({"avi", "mpeg", "mpegvideo", "h264", "hevc", "vvc", "h263", "m4v", "mjpeg", "obu", "dv"})
_FALLBACK_FPS = Fraction(25)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The frames of a stream in display order.

    Attributes:
        pts: (n,) presentation times in ticks, ascending.
        time_base: Seconds per tick.
        position: (n,) how many packets come before the frame's own.
        key_position: (k,) the same for the packets where decoding can start.
        key_pts: (k,) their presentation times.
        key_dts: (k,) their decoding times.
        is_exact: The decoder labels its frames with these ``pts``; else only the order can be used.
        is_seekable: Decoding may start at any of the key packets.
    """

    pts: Ticks
    time_base: Fraction
    position: Ticks
    key_position: Ticks
    key_pts: Ticks
    key_dts: Ticks
    is_exact: bool
    is_seekable: bool

    def times_s(self) -> npt.NDArray[np.float64]:
        """Return (n,) seconds from the first frame."""
        return np.asarray((self.pts - self.pts[0]) * float(self.time_base), np.float64)

    def key_of(self, frame: int) -> int:
        """Return the last key packet from which decoding reaches the frame with all it refers to."""
        before = np.searchsorted(self.key_position, self.position[frame], side="right")
        shown_before = np.searchsorted(self.key_pts, self.pts[frame], side="right")
        return max(int(min(before, shown_before)) - 1, 0)


def packets(container: Any, stream: Any, deadline: Deadline) -> Iterator[Any]:
    """Yield the stream's packets that carry data; a read error ends the stream, as an early end does."""
    demuxer = container.demux(stream)
    while True:
        deadline.check()
        try:
            packet = next(demuxer)
        except (StopIteration, FFmpegError):
            return
        if packet.size:
            yield packet


def decode_packet(context: Any, packet: Any) -> list[Any]:
    """Decode one packet (None drains the decoder); a damaged one gives no frames."""
    try:
        return list(context.decode(packet))
    except (FFmpegError, ValueError):
        return []


def index_packets(container: Any, stream: Any, deadline: Deadline) -> tuple[Timeline | None, Any]:
    """Build the timeline from the packets alone, decoding no further than the first frame.

    Returns:
        The timeline, None if the packets cannot be trusted to tell it; the first frame, None if none came.
    """
    names = frozenset(container.format.name.split(","))
    if names & _UNTIMED:
        return None, None
    pts, position, keys = array("q"), array("q"), []
    is_sound, last_dts, first = True, None, None
    for number, packet in enumerate(packets(container, stream, deadline)):
        if packet.pts is None or packet.is_corrupt or (number == 0 and not packet.is_keyframe):
            return None, None
        if packet.dts is not None:
            is_sound &= last_dts is None or packet.dts > last_dts
            last_dts = packet.dts
        if packet.is_keyframe:
            keys.append((number, packet.pts, packet.pts if packet.dts is None else packet.dts))
        if not packet.is_discard:
            pts.append(packet.pts)
            position.append(number)
        if first is None:
            first = next(iter(decode_packet(stream.codec_context, packet)), None)
    if first is None:
        first = next(iter(decode_packet(stream.codec_context, None)), None)
    shown = np.array(pts, np.int64)
    order = np.argsort(shown, kind="stable")
    shown = shown[order]
    if first is None or first.pts != shown[0] or bool((np.diff(shown) == 0).any()):
        return None, None
    key = np.array(keys, np.int64).reshape(-1, 3)
    is_sound &= bool((np.diff(key[:, 1]) > 0).all())
    timeline = Timeline(
        pts=shown,
        time_base=Fraction(stream.time_base),
        position=np.array(position, np.int64)[order],
        key_position=key[:, 0],
        key_pts=key[:, 1],
        key_dts=key[:, 2],
        is_exact=True,
        is_seekable=is_sound and bool(names & _SEEKABLE),
    )
    return timeline, first


def index_frames(container: Any, stream: Any, deadline: Deadline) -> tuple[Timeline, Any]:
    """Build the timeline by decoding everything once.

    Times that run backwards are put in order (AVI labels frames in decoding order); where any is missing or
    doubled, the frame rate spaces them.

    Returns:
        The timeline, possibly of no frames; and the first frame, None if none came.
    """
    found: list[int | None] = []
    first = None
    for frame in decode_all(container, stream, deadline):
        first = frame if first is None else first
        found.append(frame.pts)
    known = sorted(time for time in found if time is not None)
    time_base = Fraction(stream.time_base or Fraction(1, 1000))
    if len(set(known)) != len(found):
        rate = Fraction(stream.guessed_rate or stream.average_rate or _FALLBACK_FPS)
        time_base, known = 1 / rate, list(range(len(found)))
    empty = np.zeros(0, np.int64)
    timeline = Timeline(
        pts=np.array(known, np.int64),
        time_base=time_base,
        position=np.arange(len(known), dtype=np.int64),
        key_position=empty,
        key_pts=empty,
        key_dts=empty,
        is_exact=False,
        is_seekable=False,
    )
    return timeline, first


def decode_all(container: Any, stream: Any, deadline: Deadline) -> Iterator[Any]:
    """Yield every frame that decodes, in display order."""
    context = stream.codec_context
    for packet in packets(container, stream, deadline):
        yield from decode_packet(context, packet)
    yield from decode_packet(context, None)
