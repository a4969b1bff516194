"""Recall of known items, with intervals, beside the run before.

Runs are kept outside the index, beside the queries: one file then compares models and indexes too.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import InvalidInput
from vlm.metrics import bootstrap_means, paired_difference
from vlm.progress import track
from vlm.retrieval.durability import write_bytes_durably
from vlm.retrieval.quality.known_items import KnownItem, find_videos
from vlm.retrieval.searcher import Searcher

FORMAT = "vlm-index-check/1"
RECALL_AT = (1, 5, 10)


def check_index(
    searcher: Searcher, items: Sequence[KnownItem], folder: Path, rerank: int = 0
) -> dict[str, Any]:
    """Search for every known item and say how often it was among the first hits.

    Args:
        searcher: What is checked.
        items: What should be found.
        folder: What relative paths of videos start from.
        rerank: As `Searcher.search`.

    Returns:
        JSON-ready: ``format``, ``time``, ``index``, ``generation``, ``model``, ``model_fingerprint``,
        ``rerank``, ``recall`` ({"recall@k": {"value", "low", "high"}}), ``outcomes`` (each item with the
        ``rank`` and ``score`` that found it, null beyond the last k, and the ``strength`` of the best hit),
        ``missing`` (items whose video is not in the index; they do not count), ``bank_scores`` (the best
        score of each unrelated text).

    Raises:
        InvalidInput: The index holds none of the videos.
    """
    snapshot, outcomes, missing = searcher.index.snapshot, [], []
    targets = find_videos(items, snapshot.videos, folder)
    for item, video_id in track(list(zip(items, targets, strict=True)), "checking", unit="query"):
        if video_id is None:
            missing.append(dataclasses.asdict(item))
            continue
        hits = searcher.search(item.query, top_k=RECALL_AT[-1], rerank=rerank)
        found = next((hit for hit in hits if item.is_found_by(hit, video_id)), None)
        outcomes.append(
            {
                **dataclasses.asdict(item),
                "video_id": video_id,
                "rank": None if found is None else found.rank,
                "score": None if found is None else found.score,
                "strength": hits[0].strength if hits else None,
            }
        )
    if not outcomes:
        raise InvalidInput(
            f"{searcher.index.folder}: holds none of the {len(items)} videos that the queries name, such as "
            f"{items[0].video!r}; name them by path or by the identifiers of vlm index info --videos"
        )
    intervals = bootstrap_means({f"recall@{k}": within(outcomes, k) for k in RECALL_AT}, groups_of(outcomes))
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "index": str(searcher.index.folder),
        "generation": snapshot.generation.id,
        "model": searcher.model.name,
        "model_fingerprint": searcher.model.fingerprint,
        "rerank": rerank,
        "recall": {name: interval._asdict() for name, interval in intervals.items()},
        "outcomes": outcomes,
        "missing": missing,
        "bank_scores": [round(score, 6) for score in searcher.bank_scores()],
    }


def compare_runs(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any] | None:
    """Return how a run differs from one before, over the items that both looked for; None if there are none.

    Returns:
        ``num_items``; ``differences`` {"recall@k": {"value", "low", "high"}}, now minus before; ``is_worse``,
        some interval lies wholly below zero; ``lost`` and ``found``, the items that left or entered the hits.
    """
    earlier = {key_of(outcome): outcome for outcome in before["outcomes"]}
    both = [outcome for outcome in now["outcomes"] if key_of(outcome) in earlier]
    if not both:
        return None
    old, groups = [earlier[key_of(outcome)] for outcome in both], groups_of(both)
    differences = {
        f"recall@{k}": paired_difference(within(old, k), within(both, k), groups)._asdict() for k in RECALL_AT
    }
    pairs = list(zip(old, both, strict=True))
    return {
        "num_items": len(both),
        "differences": differences,
        "is_worse": any(interval["high"] < 0 for interval in differences.values()),
        "lost": [now for then, now in pairs if then["rank"] is not None and now["rank"] is None],
        "found": [now for then, now in pairs if then["rank"] is None and now["rank"] is not None],
    }


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs that a file keeps, the oldest first; none if it is not there.

    Raises:
        InvalidInput: It holds something else.
    """
    try:
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if any(run["format"] != FORMAT or not isinstance(run["outcomes"], list) for run in runs):
            raise ValueError(f"expected format {FORMAT}")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"{path}: not the runs of earlier checks ({error}); name another file with --runs"
        ) from error
    return runs


def keep_run(path: Path, runs: Sequence[dict[str, Any]], run: dict[str, Any]) -> None:
    """Write earlier runs and a new one.

    Raises:
        NoSpaceError: The disk is full; the earlier ones are still there.
    """
    lines = [json.dumps(entry, allow_nan=False) for entry in (*runs, run)]
    write_bytes_durably(path, ("\n".join(lines) + "\n").encode())


def within(outcomes: Sequence[dict[str, Any]], k: int) -> list[float]:
    """Return 1.0 for each outcome found among the first k, 0.0 for the others."""
    return [float(outcome["rank"] is not None and outcome["rank"] <= k) for outcome in outcomes]


def groups_of(outcomes: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return which outcomes are of one video: they stand or fall together."""
    return np.unique([outcome["video_id"] for outcome in outcomes], return_inverse=True)[1]


def key_of(outcome: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes two outcomes, or items left out, those of one row."""
    return tuple(outcome[name] for name in ("query", "video", "start_s", "end_s"))
