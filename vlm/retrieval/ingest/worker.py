"""The child process that decodes: jobs on its standard input, frames of segments on its standard output.

Run as ``python -m vlm.retrieval.ingest.worker DEVICE``, or ``cpu``. A job is one line of JSON; a reply is one
line of JSON, followed by the frames' bytes if it has a ``shape``. A job ends with a ``done`` or ``failed``
reply. The process kills itself (SIGALRM) when one step of a job takes too long, whatever the codec is doing.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from vlm.data.frame_sampling import grid_times
from vlm.errors import DataError, InvalidInput
from vlm.retrieval.segments import cut_segments
from vlm.retrieval.shots import cut_shots, find_cuts, sample_times

if TYPE_CHECKING:
    from vlm.data.decoding import Device, Video

_MEMORY_BYTES = 4 << 30
_HASH_BYTES = 16 << 20
_MAX_ASPECT = 50
_FRAMES_PER_SIGN = 64


def main() -> int:
    """Serve jobs until standard input ends."""
    # own the pipe: anything a library prints must not end up between the replies
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    # before memory is limited: a driver reserves room for all that its card could hold
    device, problem = _open_device(sys.argv[1])
    _limit_resources()
    _send(replies, {"kind": "ready", "problem": problem}, 0.0)
    for line in sys.stdin:
        job = json.loads(line)
        patience_s = float(job["patience_s"])
        reply: dict[str, Any]
        try:
            reply = {"kind": "done", **_serve(job, replies, patience_s, device)}
        except DataError as error:
            reply = {"kind": "failed", "reason": error.reason, "detail": str(error)}
        except MemoryError:
            reply = {"kind": "failed", "reason": "too_large", "detail": "decoding needs too much memory"}
        except BrokenPipeError:
            return 0
        except Exception as error:  # one odd file must not end the others
            reply = {"kind": "failed", "reason": "undecodable", "detail": f"{type(error).__name__}: {error}"}
        _send(replies, reply, 0.0)
    return 0


def _open_device(name: str) -> tuple[Device | None, str]:
    """Return the device that decodes, None for the CPU, and why there is none though one was named."""
    from vlm.data.decoding import Device

    if name == "cpu":
        return None, ""
    try:
        return Device(name), ""
    except InvalidInput as error:
        return None, str(error)


def _serve(
    job: dict[str, Any], replies: IO[bytes], patience_s: float, device: Device | None
) -> dict[str, Any]:
    """Decode a piece of a file; return the file's size, time, hash (after the last), why the CPU had to."""
    from vlm.data.decoding import DecodeLimits, open_video

    signal.setitimer(signal.ITIMER_REAL, patience_s)
    path = job["path"]
    before = _state(path)
    limits = DecodeLimits(max_seconds=patience_s * 0.8)
    with open_video(path, limits, device if job["on_device"] else None) as video:
        info = video.info
        if max(info.width, info.height) > _MAX_ASPECT * min(info.width, info.height):
            # keeping such a shape while its short side grows to the model's would take gigabytes
            raise DataError(f"{path}: frames of {info.width}x{info.height} are no picture", "too_large")
        duration_s = max(info.duration_s, 1e-3)
        if job["segments"]:
            segments = job["segments"]
        elif job["segmentation"] == "shots" and not job["only_open"]:
            cuts = find_cuts(_watch(video, replies, patience_s))
            segments = cut_shots(duration_s, cuts, job["segment_s"], job["stride_s"])
        else:
            segments = cut_segments(duration_s, job["segment_s"], job["stride_s"])
        first, count = job["first"], job["count"]
        last = len(segments) if count is None else min(first + count, len(segments))
        opened = {
            "kind": "opened",
            "duration_s": info.duration_s,
            "width": info.width,
            "height": info.height,
            "codec": info.codec,
            "fps": info.fps,
            "tags": _tags(path, limits),
            "segments": segments,
        }
        if not first:
            _send(replies, opened, patience_s)
        if job["only_open"]:
            segments, last = [], 0
        if job["grid_step_s"]:
            _send_grid(video, segments, first, last, job, replies)
        else:
            for item in video.iter_segments(segments[first:last], job["num_frames"]):
                reply = {"kind": "segment", "number": first + item.number}
                _send_frames(replies, reply, patience_s, item.frames)
    sha256 = "" if job["only_open"] or last < len(segments) else _hash(path, patience_s)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if _state(path) != before:
        raise DataError(f"{path}: the file changed while it was read", "changed")
    return {
        "size_bytes": before[0],
        "mtime_ns": before[1],
        "sha256": sha256,
        "fallback": "device_lost" if job["on_device"] and device is None else video.fallback,
    }


def _send_grid(
    video: Video,
    segments: list[tuple[float, float]],
    first: int,
    last: int,
    job: dict[str, Any],
    replies: IO[bytes],
) -> None:
    """Send each frame of the video's grid once, in order, and each segment as soon as all of its are sent.

    Of segments `first` to `last` only, as if those before had been sent.
    """
    patience_s = float(job["patience_s"])
    times_s = grid_times(segments, job["num_frames"], job["grid_step_s"])
    frames, places = np.unique(video.frames_at(times_s), return_inverse=True)
    places = places.reshape(times_s.shape)
    num_sent = int(places[:first].max(initial=-1)) + 1
    source = video.iterate(frames[num_sent : places[first:last].max(initial=-1) + 1])
    for number, shown in enumerate(places[first:last], start=first):
        while num_sent <= shown.max():
            _, frame = next(source)
            video.restart_clock()
            _send_frames(replies, {"kind": "frame"}, patience_s, frame)
            num_sent += 1
        _send(replies, {"kind": "shown", "number": number, "shown": shown.tolist()}, patience_s)


def _watch(video: Video, replies: IO[bytes], patience_s: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield a few frames a second with their times, and tell the parent now and then that all is well."""
    times_s = video.times_s
    indices = sample_times(times_s)
    for number, (index, frame) in enumerate(video.iterate(indices), start=1):
        yield float(times_s[index]), frame
        if number % _FRAMES_PER_SIGN == 0:
            video.restart_clock()
            _send(replies, {"kind": "working"}, patience_s)


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no such file ({error})", "missing") from error
    return status.st_size, status.st_mtime_ns


def _hash(path: str, patience_s: float) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while content := stream.read(_HASH_BYTES):
            digest.update(content)
            signal.setitimer(signal.ITIMER_REAL, patience_s)
    return digest.hexdigest()


def _tags(path: str, limits: Any) -> dict[str, str]:
    """Return the container's metadata, bounded: the file's author wrote it."""
    from vlm.data.decoding.opening import open_container

    with open_container(path, limits) as container:
        tags = list(container.metadata.items())[:50]
    return {str(key)[:100].lower(): str(value)[:1000] for key, value in tags}


def _send(
    replies: IO[bytes], reply: dict[str, Any], patience_s: float, payload: memoryview | None = None
) -> None:
    # a reader that is busy encoding is no reason to die: the clock runs only while decoding
    signal.setitimer(signal.ITIMER_REAL, 0)
    replies.write(json.dumps(reply).encode() + b"\n")
    if payload is not None:
        replies.write(payload)
    replies.flush()
    if patience_s:
        signal.setitimer(signal.ITIMER_REAL, patience_s)


def _send_frames(replies: IO[bytes], reply: dict[str, Any], patience_s: float, frames: np.ndarray) -> None:
    frames = np.ascontiguousarray(frames)
    _send(replies, {**reply, "shape": frames.shape}, patience_s, frames.data.cast("B"))


def _limit_resources() -> None:
    """Bound what a hostile file may take; where the system refuses, decoding goes on without the bound."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError), open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, hard))


if __name__ == "__main__":
    sys.exit(main())
