"""Tasks on a Ray cluster (Ray Core): retried when a worker or a node dies."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from vlm.errors import BusyError, IntegrityError, InvalidInput, MissingExtra, NoSpaceError, VlmError
from vlm.progress import progress_bar
from vlm.retrieval.engines.tasks import Task, TaskList, read_tasks
from vlm.retrieval.engines.working import do_task
from vlm.types import VideoTextEncoder

_RETRIES = 3
_PAUSE_S = 1.0
_ERRORS: dict[int, type[VlmError]] = {4: InvalidInput, 5: IntegrityError, 6: NoSpaceError}


@dataclass(frozen=True, kw_only=True, slots=True)
class RayEngine:
    """Runs tasks on a Ray cluster, as many at once as it has room for.

    Attributes:
        address: Of the cluster; ``$RAY_ADDRESS``, one that runs on this machine, or a new one here if None.
    """

    address: str | None = None

    def __call__(self, listing: TaskList, missing: Sequence[Task], /) -> str:
        """Run the tasks; return what is to be said of those that could not be done.

        Raises:
            MissingExtra: Ray is not installed.
            InvalidInput: There is no cluster at the address; a task found its input unusable.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("ray", "ray", "--engine ray") from error
        # Ray prints what it hears of dead nodes to stdout, which is for results
        with redirect_stdout(sys.stderr):
            is_ours = not ray.is_initialized()
            if is_ours:
                _connect(ray, self.address)
            try:
                failures = _Run(ray, listing).finish(missing)
            finally:
                if is_ours:
                    ray.shutdown()  # what still runs ends here; what it has committed stays
        if not failures:
            return ""
        number, reason = failures[-1]
        return f"{len(failures)} could not be done (task {number}: {reason}); the same command tries again"


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"no Ray cluster at {address or 'hand'} ({error}); start one with ray start --head, or name one "
            "with --ray-address"
        ) from error


class _Run:
    """The tasks of one call: waiting, under way, failed."""

    def __init__(self, ray: Any, listing: TaskList) -> None:
        self._ray, self._listing = ray, listing
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
        cpus = max(1, min(listing.options.num_workers, room))
        gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(embed_task)
        self._num_workers = cpus
        self._most = 16 + 4 * sum(int(node.get("CPU", 0)) for node in nodes)
        self._under_way: dict[Any, Task] = {}
        self._failures: list[tuple[int, str]] = []

    def finish(self, missing: Sequence[Task]) -> list[tuple[int, str]]:
        """Return number and reason of the tasks that failed for good."""
        waiting = deque(missing)
        total = self._listing.num_files
        done = total - sum(task.num_files for task in missing)
        with progress_bar(total, "embedding", "video", initial=done) as bar:
            while waiting or self._under_way:
                while waiting and len(self._under_way) < self._most:
                    task = waiting.popleft()
                    reference = self._remote.remote(str(self._listing.folder), task.number, self._num_workers)
                    self._under_way[reference] = task
                ready, _ = self._ray.wait(list(self._under_way), num_returns=1)
                for reference in ready:
                    task = self._under_way.pop(reference)
                    state = self._state(reference, task)
                    if state == "done":
                        bar.update(task.num_files)
                    elif state == "busy":
                        # a worker of a driver that died may take a moment to end
                        waiting.append(task)
                        time.sleep(_PAUSE_S)
        return self._failures

    def _state(self, reference: Any, task: Task) -> str:
        try:
            state, code, message = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failures.append((task.number, str(error).strip().splitlines()[0]))
            return "failed"
        if state == "failed":
            raise _ERRORS.get(code, VlmError)(message)
        return str(state)


def embed_task(folder: str, number: int, num_workers: int) -> tuple[str, int, str]:
    """Do one task in a worker; return ``done``, ``busy`` or ``failed``, with exit code and sentence."""
    try:
        listing = read_tasks(folder)
        listing = replace(listing, options=replace(listing.options, num_workers=num_workers))
        do_task(listing, listing.task(number), functools.partial(_load, listing.manifest.model.source))
    except BusyError as error:
        return "busy", error.exit_code, str(error)
    except VlmError as error:
        return "failed", error.exit_code, str(error)
    return "done", 0, ""


@functools.cache
def _load(source: str) -> VideoTextEncoder:
    """Load the model once a worker process, which does many tasks."""
    from vlm.retrieval.words.no_model import load_encoder

    return load_encoder(source)
