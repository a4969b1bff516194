"""The parent's side of the media workers: one child for each call at a time, a new one for each that dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.errors import BusyError, DataError

_START_S = 120.0
_GRACE_S = 10.0
_MAX_ANSWER_BYTES = 1 << 20


class MediaWorkers:
    """Child processes that open files of unknown origin; as many as there are calls at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._is_closed = False

    def run(self, kind: str, patience_s: float, **job: Any) -> dict[str, Any]:
        """Return what a child answers to a job; see `vlm.serving.media.worker`.

        Raises:
            DataError: The file cannot be used; a child that died or hung costs its file, not the server.
            BusyError: The service is closing.
        """
        with self._lock:
            if self._is_closed:
                raise BusyError("the server is shutting down")
            child = self._idle.pop() if self._idle else _Child()
            self._all.add(child)
        try:
            answer = child.ask({"kind": kind, "patience_s": patience_s, **job}, patience_s + _GRACE_S)
        except _ChildLost as error:
            with self._lock:
                self._all.discard(child)
                closing = self._is_closed
            if closing:
                raise BusyError("the server is shutting down") from error
            raise DataError(f"{job.get('path')}: {error}", error.reason) from error
        with self._lock:
            self._idle.append(child)
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        raise DataError(str(answer["detail"]), str(answer["reason"]))

    def close(self) -> None:
        """End all children."""
        with self._lock:
            self._is_closed = True
            children, self._all, self._idle = list(self._all), set(), []
        for child in children:
            child.kill()


class _ChildLost(Exception):
    """A child died or says nothing."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Child:
    """One process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, job: dict[str, Any], wait_s: float) -> dict[str, Any]:
        """Return the answer to one job."""
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(wait_s))
        except (EOFError, BrokenPipeError, ValueError) as error:
            self.kill()
            code = None if self._process is None else self._process.returncode
            if code == -signal.SIGALRM:
                raise _ChildLost("took too long to decode", "timeout") from error
            raise _ChildLost(f"the decoder died (exit code {code})", "decoder_crashed") from error
        except TimeoutError as error:
            self.kill()
            raise _ChildLost("took too long to decode", "timeout") from error
        return answer

    def kill(self) -> None:
        """End the process, which may be in the middle of a job, and give its pipes back."""
        process = self._process
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: a file named like a library beside the user's videos must not be imported
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vlm.serving.media.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
        )
        self._line(_START_S)
        return self._process

    def _line(self, wait_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], wait_s)[0]:
                raise TimeoutError
            content = os.read(descriptor, 1 << 16)
            if not content or len(self._buffer) > _MAX_ANSWER_BYTES:
                self._process.wait(1)
                raise EOFError
            self._buffer += content
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def child_environment() -> dict[str, str]:
    """Return the environment in which a child finds this package, and keeps to one thread."""
    root = str(Path(__file__).resolve().parents[3])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return environment
