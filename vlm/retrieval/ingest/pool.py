"""The parent's side of decoding: worker processes that decode ahead, their replies in the order of the jobs.

A file that crashes, hangs or exhausts its worker costs one `Failed` and a new worker, nothing else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.preprocessing import preprocess
from vlm.errors import DataError, InvalidInput
from vlm.retrieval.duplicates.hashing import grey_of, hash_frames
from vlm.retrieval.ingest.events import CPU, DecodedSegment, DecodeSettings, Event, Failed, Finished, Opened
from vlm.retrieval.ingest.schedule import Piece, Schedule, Segments
from vlm.types import Preprocessing

# of a file that several decoders share: each opens it anew, and decodes from a key frame before its piece
_PIECE_SEGMENTS = 16
# what an event without frames counts as: its list of segments may be long
_EVENT_BYTES = 4 << 10
_MAX_HEADER_BYTES = 64 << 20
_GRACE_S = 15.0
_START_S = 300.0


def decode_files(
    paths: Sequence[Path],
    settings: DecodeSettings,
    segments: Sequence[Sequence[tuple[float, float]]] | None = None,
) -> Generator[Event, None, None]:
    """Yield `Opened`, then `DecodedSegment` by number, then `Finished`, for each file in order, or `Failed`.

    `Failed` may come at any time of a file and is its last event. `file` counts `paths` from 0. Several
    processes share a long file. Closing the generator ends the processes.

    Args:
        paths: The files; one may come more than once.
        settings: How they are cut and prepared.
        segments: Instead of cutting a file evenly: its (start_s, end_s), for each file.

    Raises:
        InvalidInput: The device that is to decode is not here.
    """
    count = max(1, settings.num_workers)
    schedule: Schedule[_Found] = Schedule(
        len(paths),
        settings.ahead_bytes,
        _piece_segments(settings),
        count if settings.only_open else (count + 1) // 2,
    )
    workers = [_Worker(settings) for _ in range(count)]
    if paths and settings.decode_with != CPU:
        workers[0].start()
    threads = [
        threading.Thread(target=_feed, args=(worker, paths, segments, schedule), daemon=True)
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    try:
        for file, path in enumerate(paths):
            with closing(schedule.read(file)) as found:
                yield from _as_one(file, path, found, settings.preprocessing.image_size)
    finally:
        schedule.close()
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()


def check_device(decode_with: str) -> None:
    """Raise InvalidInput unless a decoding process can open the device; the CPU always can."""
    if decode_with != CPU:
        worker = _Worker(DecodeSettings(preprocessing=Preprocessing(), decode_with=decode_with))
        try:
            worker.start()
        finally:
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


def _piece_segments(settings: DecodeSettings) -> int | None:
    return None if settings.only_open or settings.num_workers <= 1 else _PIECE_SEGMENTS


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame (1, 3, height, width) of a file's grid, which segments share, and its hash."""

    video: np.ndarray
    hashes: np.ndarray


@dataclass(frozen=True, slots=True)
class _Shown:
    """A segment of frames of the grid, counted over the file."""

    number: int
    shown: list[int]


_Found = Event | _Frame | _Shown


def _feed(
    worker: _Worker,
    paths: Sequence[Path],
    segments: Sequence[Segments] | None,
    schedule: Schedule[_Found],
) -> None:
    """Have one worker decode what is next until nothing is left, holding back while nobody reads."""
    try:
        while (piece := schedule.take()) is not None:
            known = piece.segments if segments is None else list(segments[piece.file])
            for event in worker.decode(piece, paths[piece.file], known):
                if isinstance(event, Opened):
                    schedule.opened(piece, event.segments)
                frames = event.video.nbytes if isinstance(event, (DecodedSegment, _Frame)) else 0
                if not schedule.put(piece, event, _EVENT_BYTES + frames):
                    return
            schedule.end(piece)
    except BaseException as error:  # shown to the reader, who would wait for ever otherwise
        schedule.fail(error)


def _as_one(file: int, path: Path, found: Iterator[_Found], image_size: int) -> Iterator[Event]:
    """Yield the events of a file from what was found in its pieces, each of which ends with `Finished`."""
    grid = _Grid(image_size)
    before: Finished | None = None
    for item in found:
        if isinstance(item, _Frame):
            grid.add(item.video, item.hashes)
        elif isinstance(item, _Shown):
            yield grid.segment(file, item.number, item.shown)
        elif isinstance(item, Finished):
            if before and (before.size_bytes, before.mtime_ns) != (item.size_bytes, item.mtime_ns):
                yield Failed(
                    file=file, reason="changed", detail=f"{path}: the file changed while it was read"
                )
                return
            before = replace(item, fallback=(before.fallback if before else "") or item.fallback)
        else:
            yield item
            if isinstance(item, Failed):
                return
    assert before is not None
    yield before


class _Grid:
    """The frames of a file that its segments share: their hashes, and those that no segment brought yet."""

    def __init__(self, image_size: int) -> None:
        self._new = [np.zeros((0, 3, image_size, image_size), np.float32)]
        self._hashes: list[np.ndarray] = []

    def add(self, video: np.ndarray, hashes: np.ndarray) -> None:
        self._new.append(video)
        self._hashes.append(hashes)

    def segment(self, file: int, number: int, shown: list[int]) -> DecodedSegment:
        """Return a segment with the frames that came since the one before."""
        video = np.concatenate(self._new)
        del self._new[1:]
        hashes = np.concatenate([self._hashes[frame] for frame in shown])
        return DecodedSegment(
            file=file, number=number, video=video, hashes=hashes, shown=np.array(shown, np.int64)
        )


class _WorkerDied(Exception):
    """The worker's output ended."""


class _WorkerSilent(Exception):
    """The worker lives, but says nothing."""


# how a process is lost: what it said last is no answer
_LOSSES = (_WorkerDied, _WorkerSilent, BrokenPipeError, ValueError)


class _Worker:
    """One child process, started again after each file that killed it."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._grey = grey_of(settings.preprocessing)
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._patience_s = _START_S
        self._problem = ""
        self._job = {
            "segment_s": settings.segment_s,
            "stride_s": settings.stride_s,
            "segmentation": settings.segmentation,
            "patience_s": settings.patience_s,
            "only_open": settings.only_open,
            "grid_step_s": settings.grid_step_s,
            "num_frames": settings.preprocessing.num_frames,
            "count": _piece_segments(settings),
        }

    def start(self) -> None:
        """Start the process.

        Raises:
            InvalidInput: The device that is to decode cannot be opened there.
        """
        name = self._settings.decode_with
        try:
            self._running()
        except _LOSSES as error:
            self._problem = f"cannot decode with {self._bury(0, Path(name), error).detail}"
        if self._problem:
            self.close()
            raise InvalidInput(self._problem)

    def decode(self, piece: Piece[_Found], path: Path, segments: Segments | None) -> Iterator[_Found]:
        """Yield what a piece of a file is; where a device took the process down, the CPU goes on."""
        num_given, reason = 0, ""
        for on_device in (True, False) if self._settings.decode_with != CPU else (False,):
            try:
                for number, event in enumerate(self._attempt(piece, path, segments, on_device)):
                    if isinstance(event, (Finished, Failed)):
                        yield (
                            replace(event, fallback=reason)
                            if reason and isinstance(event, Finished)
                            else event
                        )
                        return
                    if number == num_given:
                        num_given += 1
                        yield event
            except _LOSSES as error:
                failed = self._bury(piece.file, path, error)
                reason = failed.reason
        yield failed

    def _attempt(
        self, piece: Piece[_Found], path: Path, segments: Segments | None, on_device: bool
    ) -> Iterator[_Found]:
        process, file = self._running(), piece.file
        job = {**self._job, "path": os.fspath(path), "segments": segments, "on_device": on_device}
        job["first"] = piece.first
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        while True:
            reply = json.loads(self._read_line())
            kind = reply.pop("kind")
            if kind == "segment":
                video, hashes = self._read_frames(reply["shape"])
                yield DecodedSegment(file=file, number=int(reply["number"]), video=video, hashes=hashes)
            elif kind == "frame":
                yield _Frame(*self._read_frames([1, *reply["shape"]]))
            elif kind == "shown":
                yield _Shown(int(reply["number"]), reply["shown"])
            elif kind == "opened":
                reply["segments"] = [(float(start), float(end)) for start, end in reply["segments"]]
                yield Opened(file=file, **reply)
            elif kind == "done":
                yield Finished(file=file, **reply)
            elif kind == "failed":
                yield Failed(file=file, reason=str(reply["reason"]), detail=str(reply["detail"]))
            elif kind != "working":
                raise ValueError(f"a reply of unknown kind {kind!r}")

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
                [sys.executable, "-P", "-m", "vlm.retrieval.ingest.worker", self._settings.decode_with],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            # it is ready: its imports must not count as the first file's time
            self._problem = json.loads(self._read_line()).get("problem", "")
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

    def _read_frames(self, shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read (frames, height, width, 3) bytes; return them preprocessed, and their hashes."""
        frames = np.empty(shape, np.uint8)
        self._read_into(frames.data.cast("B"))
        video = preprocess(frames, self._settings.preprocessing).numpy()
        return video, hash_frames(video, self._grey)

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
