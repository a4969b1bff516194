"""Clients that ask one search after another over connections that stay open, for a time that ends."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_TIMEOUT_S = 60.0
FAILED = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request.

    Attributes:
        begun_s: When it was sent, by `time.perf_counter`.
        seconds: How long it took.
        status: Of HTTP; `FAILED` if no answer came.
        says_when: Whether a header said when to come back.
    """

    begun_s: float
    seconds: float
    status: int
    says_when: bool


class Connection:
    """One client's connection to a server on this machine."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)

    def search(self, values: dict[str, Any]) -> tuple[Answer, dict[str, Any]]:
        """Search once; return how it went, and the JSON that came (none if it failed)."""
        begun = time.perf_counter()
        try:
            body = json.dumps(values)
            self._connection.request("POST", "/api/search", body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            content = response.read()
            status, says_when = response.status, "Retry-After" in response.headers
        except (OSError, http.client.HTTPException):
            self.close()
            content, status, says_when = b"{}", FAILED, False
        taken = time.perf_counter() - begun
        return Answer(begun, taken, status, says_when), json.loads(content)

    def close(self) -> None:
        """Hang up; the next search connects again."""
        self._connection.close()


class Crowd:
    """So many clients, each in a thread, asking from `begin` until `end`."""

    def __init__(self, address: str, texts: Sequence[str], num_clients: int) -> None:
        self._address, self._texts = address, texts
        self._is_over = threading.Event()
        self._answers: list[list[Answer]] = [[] for _ in range(num_clients)]
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(num_clients)]

    def begin(self) -> None:
        """Start asking."""
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Answer]:
        """Let everybody finish, and return all answers in the order they were asked for."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        return sorted((one for own in self._answers for one in own), key=lambda answer: answer.begun_s)

    def _ask(self, number: int) -> None:
        connection, turn = Connection(self._address), number
        while not self._is_over.is_set():
            text = self._texts[turn % len(self._texts)]
            self._answers[number].append(connection.search({"text": text, "top_k": 10})[0])
            turn += len(self._threads)
        connection.close()


def ask_for(address: str, texts: Sequence[str], num_clients: int, seconds: float) -> list[Answer]:
    """Return what so many clients were answered in so many seconds."""
    crowd = Crowd(address, texts, num_clients)
    crowd.begin()
    time.sleep(seconds)
    return crowd.end()


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return counts by status, and requests a second and latencies of those that were answered with hits."""
    good = [answer for answer in answers if answer.status == http.client.OK]
    taken_ms = 1e3 * np.array([answer.seconds for answer in good] or [np.nan])
    first = min((answer.begun_s for answer in answers), default=0.0)
    last = max((answer.begun_s + answer.seconds for answer in answers), default=0.0)
    statuses = Counter(str(answer.status) for answer in answers)
    return {
        "requests": len(answers),
        "statuses": dict(sorted(statuses.items())),
        "errors": len(answers) - len(good),
        "requests_per_s": len(good) / max(last - first, 1e-9),
        "p50_ms": float(np.median(taken_ms)),
        "p99_ms": float(np.quantile(taken_ms, 0.99)),
    }
