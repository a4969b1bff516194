"""Searches that come together are one pass over the vectors: reading them is what costs, not comparing."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

import numpy as np

from vlm.retrieval.backends import Backend


@dataclass(slots=True, eq=False)
class _Request:
    """A query that waits, and what came of it."""

    query: np.ndarray
    top_k: int
    found: tuple[np.ndarray, np.ndarray] | None = None
    error: Exception | None = None
    woken: threading.Event = field(default_factory=threading.Event)

    @property
    def is_done(self) -> bool:
        return self.found is not None or self.error is not None


class BatchingBackend:
    """A backend that answers all that wait at once; each answer is the one it would get alone.

    While one pass runs, further searches gather, and whoever is next makes the pass for all of them: a lone
    search never waits. Searches that share nothing, because they are filtered or the backend looks at other
    rows for each, run by themselves, as many at a time as there are cores: more would only be in the way.
    """

    def __init__(self, inner: Backend) -> None:
        self.name, self.shares_passes = inner.name, inner.shares_passes
        self._inner = inner
        self._waiting: list[_Request] = []
        self._lock, self._is_running = threading.Lock(), False
        self._alone = threading.BoundedSemaphore(os.cpu_count() or 1)

    def search(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows of each query; see `Backend.search`."""
        if allowed is not None or len(queries) != 1 or not self.shares_passes:
            with self._alone:
                return self._inner.search(queries, top_k, allowed)
        request = _Request(queries, top_k)
        with self._lock:
            self._waiting.append(request)
            is_next, self._is_running = not self._is_running, True
        if not is_next:
            request.woken.wait()
        if not request.is_done:
            self._lead()
        if request.error is not None:
            raise request.error
        assert request.found is not None
        return request.found

    def _lead(self) -> None:
        """Make a pass for all that wait, then wake them, and whoever makes the next."""
        with self._lock:
            batch, self._waiting = self._waiting, []
        self._run(batch)
        with self._lock:
            following = self._waiting[:1]
            self._is_running = bool(following)
        # each by itself: all at once, they would only wait for one another
        for request in (*following, *batch):
            request.woken.set()

    def _run(self, batch: list[_Request]) -> None:
        try:
            queries = np.concatenate([request.query for request in batch])
            scores, rows = self._inner.search(queries, max(request.top_k for request in batch))
        except Exception as error:
            for request in batch:
                request.error = error
            return
        for line, request in enumerate(batch):
            part = slice(line, line + 1), slice(0, request.top_k)
            request.found = scores[part], rows[part]
