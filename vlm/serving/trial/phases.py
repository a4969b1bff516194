"""What the server is put through: known texts, new ones, ten times as many clients, a growing index."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.serving.trial.clients import Answer, Connection, Crowd, ask_for, summary
from vlm.serving.trial.site import Served, text_of
from vlm.serving.trial.writer import writing

LIMITS = {
    "requests_per_s": 200.0,
    "p99_ms": 150.0,
    "recovered_s": 5.0,
    "fresh_s": 5.0,
}
OVERLOAD = 10
_NUM_TEXTS = 200
_WINDOW_S = 0.5
_PROBE_S = 0.05
_BUSY = 503


def warm_up(site: Served) -> list[str]:
    """Ask each text once, so that the server holds its vector; return the texts."""
    texts = [f"what happens in clip {number}" for number in range(_NUM_TEXTS)]
    connection = Connection(site.address)
    for text in texts:
        connection.search({"text": text})
    connection.close()
    return texts


class NewTexts(Sequence[str]):
    """Texts of which no two are the same, as long as those that people write."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: Any) -> Any:
        return f"a small red seven moves left, then a blue {number} jumps over it"


def ordinary(site: Served, texts: Sequence[str], num_clients: int, seconds: float) -> dict[str, Any]:
    """Return how so many clients are served, and the processor time of server and clients for a request."""
    before, own = processor_s(site.process), time.process_time()
    answers = ask_for(site.address, texts, num_clients, seconds)
    used, own = processor_s(site.process) - before, time.process_time() - own
    found = summary(answers)
    count = max(1, found["requests"])
    times = {"processor_ms": 1e3 * used / count, "client_processor_ms": 1e3 * own / count}
    return {"clients": num_clients, **found, **times}


def overload(
    site: Served, texts: Sequence[str], num_clients: int, seconds: float, after_s: float
) -> dict[str, Any]:
    """Return how ten times as many clients are answered, and how soon after them all is as before.

    They come back at once, whatever they are told; afterwards the ordinary number is watched for `after_s`.
    """
    during = ask_for(site.address, texts, OVERLOAD * num_clients, seconds)
    end = time.perf_counter()
    after = ask_for(site.address, texts, num_clients, after_s)
    refused = [answer for answer in during if answer.status == _BUSY]
    return {
        "clients": OVERLOAD * num_clients,
        **summary(during),
        "refused": len(refused),
        "refused_without_retry_after": sum(not answer.says_when for answer in refused),
        "other_errors": sum(answer.status not in (http.client.OK, _BUSY) for answer in during),
        "recovered_s": recovered_s(after, end),
        "after": summary(after),
    }


def recovered_s(answers: Sequence[Answer], end: float) -> float | None:
    """Return how long after `end` the last half second ended in which requests failed or took too long.

    Returns:
        Seconds; None if the last half second was still such a one.
    """
    last, latest = 0.0, 0
    windows: dict[int, list[Answer]] = {}
    for answer in answers:
        window = int((answer.begun_s - end) / _WINDOW_S)
        windows.setdefault(window, []).append(answer)
        latest = max(latest, window)
    for window, part in windows.items():
        found = summary(part)
        if found["errors"] or found["p99_ms"] > LIMITS["p99_ms"]:
            last = max(last, (window + 1) * _WINDOW_S)
    return None if last > latest * _WINDOW_S else last


def during_ingest(
    site: Served, index: Path, texts: Sequence[str], num_clients: int, num_clips: int, every_s: float
) -> dict[str, Any]:
    """Return how clients are served while clips are added, and how soon the added ones are found.

    Each commit's last clip is searched for, by a text that is like it, until it is the best hit.
    """
    crowd, connection = Crowd(site.address, texts, num_clients), Connection(site.address)
    before, added = processor_s(site.process), 0
    waits: list[float | None] = []
    probes: list[Answer] = []
    crowd.begin()
    try:
        with writing(index, num_clips, every_s) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                told = json.loads(line)
                added += told["clips"]
                waits.append(_wait_for(connection, told["last"], told["time"], probes))
        is_whole = writer.returncode == 0
    finally:
        answers = crowd.end()
        connection.close()
    found = [wait for wait in waits if wait is not None]
    used = processor_s(site.process) - before
    answers = [*answers, *probes]
    return {
        "clients": num_clients,
        **summary(answers),
        "processor_ms": 1e3 * used / max(1, len(answers)),
        "added": added,
        "commits": len(waits),
        "writer_is_whole": is_whole,
        "never_found": len(waits) - len(found),
        "fresh_p50_s": float(np.median(found)) if found else None,
        "fresh_max_s": max(found, default=None),
    }


def _wait_for(connection: Connection, number: int, since: float, probes: list[Answer]) -> float | None:
    """Return the seconds from `since` until a clip is found; None if they are twice the limit."""
    while time.time() - since < 2 * LIMITS["fresh_s"]:
        answer, page = connection.search({"text": text_of(number), "top_k": 1})
        probes.append(answer)
        hits = page.get("hits", [])
        if hits and hits[0]["video_id"] == f"video-{number:07d}":
            return time.time() - since
        time.sleep(_PROBE_S)
    return None


def processor_s(process: int) -> float:
    """Return the processor time that a process has used; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def kept(figures: dict[str, Any]) -> dict[str, bool]:
    """Return which of the promises the figures keep."""
    plain, new, rush, ingest = (figures[name] for name in ("ordinary", "new texts", "overload", "ingest"))
    fresh = ingest["fresh_max_s"]
    return {
        "no errors": plain["errors"] == new["errors"] == 0,
        "requests/s": plain["requests_per_s"] >= LIMITS["requests_per_s"],
        "p99": plain["p99_ms"] <= LIMITS["p99_ms"],
        "new texts, requests/s": new["requests_per_s"] >= LIMITS["requests_per_s"],
        "new texts, p99": new["p99_ms"] <= LIMITS["p99_ms"],
        "503 with Retry-After": rush["refused"] > 0
        and rush["refused_without_retry_after"] == rush["other_errors"] == 0,
        "recovers": rush["recovered_s"] is not None and rush["recovered_s"] <= LIMITS["recovered_s"],
        "no failed reads": ingest["errors"] == 0,
        "fresh": not ingest["never_found"] and fresh is not None and fresh <= LIMITS["fresh_s"],
    }
