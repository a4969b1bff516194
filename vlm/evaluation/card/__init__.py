"""The evaluation card: what was measured, by which protocol, with what result; one JSON file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import InvalidInput
from vlm.evaluation.protocol import BootstrapSettings
from vlm.metrics import Interval, RankCounts, bootstrap_means
from vlm.metrics.matrices import Floats, Ints

FORMAT = "vlm-card/1"
DIRECTIONS = ("query_to_item", "item_to_query")
TITLES = {
    "query_to_item": "text to video",
    "item_to_query": "video to text",
    "video_to_class": "video to class",
    "multiple_choice": "multiple choice",
    "answers": "answers",
    "moments": "moments",
    "highlights": "highlights",
}
Card = dict[str, Any]


def measure(
    counts: RankCounts, groups: Ints, recall_at: tuple[int, ...], bootstrap: BootstrapSettings
) -> dict[str, Any]:
    """Return every measure that the ranks allow, each ``{"value", "low", "high"}``, recalls as fractions.

    Recall beyond the scored items, and ranks where some positive was not scored, are not defined and absent.
    """
    named = _shares(counts, recall_at)
    if counts.has_ranks:
        named["mean_rank"] = counts.expected_rank()
    means = bootstrap_means(
        named, groups, resamples=bootstrap.resamples, seed=bootstrap.seed, unbounded=("mean_rank",)
    )
    block: dict[str, Any] = {name: as_json(interval) for name, interval in means.items()}
    if counts.has_ranks:
        block["median_rank"] = as_json(bootstrap.median(named["mean_rank"], groups))
    return block


def values_of(counts: RankCounts, recall_at: tuple[int, ...]) -> dict[str, Any]:
    """Return the measures of ``measure`` as plain ``{"value"}`` entries, for exact figures."""
    named = _shares(counts, recall_at)
    block: dict[str, Any] = {name: {"value": float(values.mean())} for name, values in named.items()}
    ranks = counts.expected_rank()
    block["median_rank"] = {"value": float(np.median(ranks))}
    block["mean_rank"] = {"value": float(ranks.mean())}
    return block


def as_json(interval: Interval | None) -> dict[str, float] | None:
    """Return an interval as the card writes it."""
    return None if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def _shares(counts: RankCounts, recall_at: tuple[int, ...]) -> dict[str, Floats]:
    recalls = {f"recall@{k}": counts.recall(k) for k in recall_at if k <= counts.num_scored}
    return recalls | _gains(counts)


def _gains(counts: RankCounts) -> dict[str, Floats]:
    named = {"ndcg@10": counts.ndcg, "map": counts.average_precision}
    return {name: values for name, values in named.items() if values is not None}


def counts_as_json(counts: RankCounts, groups: Ints) -> dict[str, Any]:
    """Return the outcome of each query, from which every measure and paired difference can be had again."""
    return {
        "above": counts.above.tolist(),
        "tied": counts.tied.tolist(),
        "tied_positives": counts.tied_positives.tolist(),
        "num_scored": counts.num_scored,
        "num_items": counts.num_items,
        "groups": groups.tolist(),
        **{name: values.tolist() for name, values in _gains(counts).items()},
    }


def counts_from_json(block: Mapping[str, Any]) -> RankCounts:
    """Read the counts that ``counts_as_json`` wrote."""
    above, tied, positives = (
        np.asarray(block[name], np.int64) for name in ("above", "tied", "tied_positives")
    )
    return RankCounts(
        above,
        tied,
        positives,
        int(block["num_scored"]),
        int(block["num_items"]),
        *(np.asarray(block[name], np.float64) if name in block else None for name in ("ndcg@10", "map")),
    )


def write_card(card: Card, path: Path) -> None:
    """Write a card completely or not at all; an older one stays in place until then.

    Raises:
        InvalidInput: The card holds a number that is not finite; nothing is written.
        OSError: The folder cannot be written.
    """
    try:
        text = _as_text(card)
    except ValueError as error:
        raise InvalidInput(f"{path}: a figure is not finite, so no card is written: {error}") from error
    write_whole(text + "\n", path)


def _as_text(card: Card) -> str:
    """Return indented JSON, the outcomes of single queries last and on one line, for there are thousands."""
    read = {name: section for name, section in card.items() if name != "per_query"}
    text = json.dumps(read, indent=1, allow_nan=False, ensure_ascii=False)
    if "per_query" not in card:
        return text
    outcomes = json.dumps(card["per_query"], separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return f'{text.removesuffix("}").rstrip()},\n "per_query": {outcomes}\n}}'


def write_whole(text: str, path: Path) -> None:
    """Write a file completely or not at all; an older one stays in place until then.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_card(path: Path) -> Card:
    """Read a card.

    Raises:
        InvalidInput: The file is missing or is not a card of this format.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{path}: no such card; write one with: vlm eval retrieval ... --out {path}"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read as a JSON card: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        got = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise InvalidInput(f"{path}: expected a card of format {FORMAT!r}, got {got!r}")
    for section in ("protocol", "model", "results"):
        if not isinstance(card.get(section), dict):
            raise InvalidInput(f"{path}: the card has no section {section!r}")
    return card


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
