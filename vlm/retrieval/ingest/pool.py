"""The parent's side of decoding: worker processes that decode ahead, their replies in the order of the jobs.

A file that crashes, hangs or exhausts its worker costs one `Failed` and a new worker, nothing else.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.preprocessing import preprocess
from vlm.errors import DataError
from vlm.retrieval.segments import Segmentation
from vlm.types import Preprocessing

_SEGMENTS_AHEAD = 8
_MAX_HEADER_BYTES = 64 << 20
_GRACE_S = 15.0
_START_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How files become segments.

    Attributes:
        preprocessing: The model's.
        segment_s: Length of a segment.
        stride_s: From one segment's start to the next.
        segmentation: ``shots`` cuts where one shot ends and another begins, and each shot evenly.
        patience_s: Longest time that opening a file, or the next segment, may take.
        num_workers: Processes that decode at the same time.
        only_open: Read the files' facts, but no frames.
    """

    preprocessing: Preprocessing
    segment_s: float = 8.0
    stride_s: float = 4.0
    segmentation: Segmentation = "even"
    patience_s: float = 60.0
    num_workers: int = 1
    only_open: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A file is a video: `segments` are (start_s, end_s), `fps` its mean rate, `tags` its metadata."""

    file: int
    duration_s: float
    width: int
    height: int
    codec: str
    fps: float
    tags: dict[str, str]
    segments: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedSegment:
    """Segment `number` of a file: `video` (frames, 3, height, width) float32, preprocessed."""

    file: int
    number: int
    video: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """All segments of a file have come; size and hash are those of the bytes that were decoded."""

    file: int
    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A file cannot be decoded: a short countable reason, and a sentence."""

    file: int
    reason: str
    detail: str


Event = Opened | DecodedSegment | Finished | Failed


def decode_files(
    paths: Sequence[Path],
    settings: DecodeSettings,
    segments: Sequence[Sequence[tuple[float, float]]] | None = None,
) -> Generator[Event, None, None]:
    """Yield `Opened`, then `DecodedSegment` by number, then `Finished`, for each file in order, or `Failed`.

    `Failed` may come at any time of a file and is its last event. `file` counts `paths` from 0. Closing the
    generator ends the processes.

    Args:
        paths: The files; one may come more than once.
        settings: How they are cut and prepared.
        segments: Instead of cutting a file evenly: its (start_s, end_s), for each file.
    """
    count = max(1, min(settings.num_workers, len(paths)))
    stop = threading.Event()
    lanes: list[queue.Queue[Event | BaseException]] = [queue.Queue(_SEGMENTS_AHEAD) for _ in range(count)]
    workers = [_Worker(settings) for _ in range(count)]
    threads = [
        threading.Thread(
            target=_feed,
            args=(workers[k], paths, segments, range(k, len(paths), count), lanes[k], stop),
            daemon=True,
        )
        for k in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        for file in range(len(paths)):
            while True:
                event = lanes[file % count].get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, (Finished, Failed)):
                    break
    finally:
        stop.set()
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()


def decode_one(
    path: Path, settings: DecodeSettings, segments: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """Return the first segment of a file, (frames, 3, height, width) float32; see `decode_files`.

    Raises:
        DataError: The file is gone, cannot be decoded, or has no frames there.
    """
    with closing(decode_files([path], settings, None if segments is None else [segments])) as events:
        for event in events:
            if isinstance(event, DecodedSegment):
                return event.video
            if isinstance(event, Failed):
                raise DataError(event.detail, event.reason)
    raise DataError(f"{path}: no frames could be decoded", "no_frames")


def _feed(
    worker: _Worker,
    paths: Sequence[Path],
    segments: Sequence[Sequence[tuple[float, float]]] | None,
    files: range,
    lane: queue.Queue[Event | BaseException],
    stop: threading.Event,
) -> None:
    """Run one worker's share of the files, holding back while its lane is full."""
    try:
        for file in files:
            for event in worker.decode(file, paths[file], None if segments is None else segments[file]):
                while not stop.is_set():
                    with suppress(queue.Full):
                        lane.put(event, timeout=0.2)
                        break
                if stop.is_set():
                    return
    except BaseException as error:  # shown to whoever reads the lane, who would wait for ever otherwise
        if not stop.is_set():
            lane.put(error)


class _WorkerDied(Exception):
    """The worker's output ended."""


class _WorkerSilent(Exception):
    """The worker lives, but says nothing."""


class _Worker:
    """One child process, started again after each file that killed it."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._patience_s = _START_S
        self._job = {
            "segment_s": settings.segment_s,
            "stride_s": settings.stride_s,
            "segmentation": settings.segmentation,
            "patience_s": settings.patience_s,
            "only_open": settings.only_open,
            "num_frames": settings.preprocessing.num_frames,
        }

    def decode(
        self, file: int, path: Path, segments: Sequence[tuple[float, float]] | None
    ) -> Iterator[Event]:
        """Yield the events of one file."""
        try:
            process = self._running()
            job = {**self._job, "path": os.fspath(path), "segments": segments}
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            while True:
                reply = json.loads(self._read_line())
                kind = reply.pop("kind")
                if kind == "segment":
                    frames = np.empty(reply["shape"], np.uint8)
                    self._read_into(frames.data.cast("B"))
                    video = preprocess(frames, self._settings.preprocessing).numpy()
                    yield DecodedSegment(file=file, number=int(reply["number"]), video=video)
                elif kind == "opened":
                    reply["segments"] = [(float(start), float(end)) for start, end in reply["segments"]]
                    yield Opened(file=file, **reply)
                elif kind == "working":
                    continue
                elif kind == "done":
                    yield Finished(file=file, **reply)
                    return
                else:
                    yield Failed(file=file, reason=str(reply["reason"]), detail=str(reply["detail"]))
                    return
        except (_WorkerDied, _WorkerSilent, BrokenPipeError, ValueError) as error:
            yield self._bury(file, path, error)

    def kill(self) -> None:
        """End the process at once; `close` afterwards."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Wait for the process and give its pipes back."""
        process, self._process = self._process, None
        self._buffer.clear()
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None
            with suppress(OSError):
                process.stdin.close()
            process.stdout.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            root = str(Path(__file__).resolve().parents[3])
            known = os.environ.get("PYTHONPATH")
            environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}
            environment.setdefault("OMP_NUM_THREADS", "1")
            self._patience_s = _START_S
            # -P: a file named like a library beside the user's videos must not be imported
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vlm.retrieval.ingest.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            self._read_line()  # it is ready: its imports must not count as the first file's time
            self._patience_s = self._settings.patience_s + _GRACE_S
        return self._process

    def _bury(self, file: int, path: Path, error: Exception) -> Failed:
        process, code = self._process, None
        if process is not None:
            if not isinstance(error, _WorkerDied):
                process.kill()
            code = process.wait()
        self.close()
        if isinstance(error, _WorkerSilent) or code == -signal.SIGALRM:
            detail = f"{path}: decoding one piece took longer than {self._settings.patience_s:g} s"
            return Failed(file=file, reason="timeout", detail=detail)
        return Failed(
            file=file, reason="decoder_crashed", detail=f"{path}: the decoder died (exit code {code})"
        )

    def _read_line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_HEADER_BYTES:
                raise ValueError("a reply has no end")
            self._fill()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _read_into(self, target: memoryview) -> None:
        count = min(len(self._buffer), len(target))
        target[:count] = self._buffer[:count]
        del self._buffer[:count]
        while count < len(target):
            received = os.readv(self._await(), [target[count:]])
            if not received:
                raise _WorkerDied
            count += received

    def _fill(self) -> None:
        content = os.read(self._await(), 1 << 20)
        if not content:
            raise _WorkerDied
        self._buffer += content

    def _await(self) -> int:
        """Wait until the worker has written something; return where."""
        process: Any = self._process
        descriptor: int = process.stdout.fileno()
        # the worker ends itself first; this second bound is for one that is stopped or stuck in the kernel
        ready, _, _ = select.select([descriptor], [], [], self._patience_s)
        if not ready:
            raise _WorkerSilent
        return descriptor
