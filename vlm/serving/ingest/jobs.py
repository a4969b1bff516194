"""Indexing jobs: one at a time, in a process of its own, watched by a thread."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm.serving.media.pool import child_environment
from vlm.serving.transport.metrics import Metrics
from vlm.serving.transport.problems import NotFound, Problem

_KEPT_JOBS = 50
_PATIENCE_S = 10.0


@dataclass(kw_only=True, slots=True)
class Job:
    """One run over a folder.

    Attributes:
        id: Names it.
        folder: Which of the server's folders.
        state: How it stands.
        stage: What is being done.
        done: Videos that are through.
        total: Videos that are to be embedded; None until they are counted.
        report: What it did, once it is done.
        message: What went wrong, if it failed.
        started: Seconds since 1970.
        ended: The same.
    """

    id: str
    folder: str
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    stage: str = "starting"
    done: float = 0
    total: float | None = None
    report: dict[str, Any] | None = None
    message: str | None = None
    started: float = field(default_factory=time.time)
    ended: float | None = None

    def values(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


class IngestJobs:
    """The folders that may be indexed, and the jobs that do or did it.

    Args:
        index: The index folder.
        model: Where the index's model is found.
        folders: Name → folder; clients know only the names.
        allow_narrow_model: As for `VideoIndex.add`.
        metrics: Where items are counted.
        refresh: Has searches see what a job committed; called before the job is said to be over.
    """

    def __init__(
        self,
        index: Path,
        model: str,
        folders: dict[str, Path],
        allow_narrow_model: bool,
        metrics: Metrics,
        refresh: Callable[[], object],
    ) -> None:
        self.folders, self._refresh = folders, refresh
        self._job = {"index": str(index), "model": model, "allow_narrow_model": allow_narrow_model}
        self._metrics = metrics
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def list(self) -> list[Job]:
        """Return the jobs, newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def find(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFound: There is none of that name.
        """
        with self._lock:
            if job_id not in self._jobs:
                raise NotFound("job")
            return self._jobs[job_id]

    def start(self, folder: str) -> Job:
        """Begin to index a folder.

        Raises:
            NotFound: The server has no folder of that name.
            Problem: A job is running already (409).
        """
        if folder not in self.folders:
            raise NotFound("folder; the server's owner names them when it starts")
        with self._lock:
            running = next((job for job in self._jobs.values() if job.state == "running"), None)
            if running is not None:
                raise Problem(409, "running", f"job {running.id} is indexing {running.folder!r}; wait for it")
            if self._process is not None and self._process.poll() is None:
                raise Problem(409, "running", "the job that was stopped has not ended yet; try again")
            job = Job(id=secrets.token_hex(8), folder=folder)
            self._process = self._spawn(folder)
            self._jobs[job.id] = job
            while len(self._jobs) > _KEPT_JOBS:
                self._jobs.popitem(last=False)
            self._thread = threading.Thread(target=self._watch, args=(job, self._process), daemon=True)
            self._thread.start()
            return job

    def cancel(self, job_id: str) -> Job:
        """Ask a running job to stop; what it committed stays."""
        job = self.find(job_id)
        with self._lock:
            if job.state == "running" and self._process is not None:
                job.state = "cancelled"
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGTERM)
        return job

    def close(self) -> None:
        """Stop what is running, and wait for it."""
        with self._lock:
            process, thread = self._process, self._thread
        if process is None or thread is None:
            return
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
            process.kill()
        thread.join(_PATIENCE_S)

    def _spawn(self, folder: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vlm.serving.ingest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=child_environment(),
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({**self._job, "paths": [str(self.folders[folder])]}) + "\n")
        process.stdin.close()
        return process

    def _watch(self, job: Job, process: subprocess.Popen[str]) -> None:
        last: dict[str, Any] = {}
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                last = json.loads(line)
                if last["event"] == "progress":
                    job.stage, job.done, job.total = last["stage"], last["done"], last["total"]
        code = process.wait()
        self._refresh()
        job.ended = time.time()
        report = {key: value for key, value in last.items() if key != "event"}
        if last.get("event") == "done":
            job.report, job.stage = report, "done"
            self._metrics.count("ingest_items_total", report["num_added"], result="added")
            self._metrics.count("ingest_items_total", report["num_updated"], result="updated")
            self._metrics.count("ingest_items_total", len(report["rejected"]), result="rejected")
            job.state = "done"
        elif job.state == "running":
            job.message = last.get("message") or f"the indexing process died (exit code {code})"
            job.state = "failed"
