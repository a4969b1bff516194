"""Moments that somebody's model found, as a file of lines; the form in which QVHighlights takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import InvalidInput
from vlm.evaluation.moments.data import MomentSet
from vlm.evaluation.scores.files import parse_json, read_text
from vlm.metrics.matrices import Floats
from vlm.retrieval.durability import write_bytes_durably

_ID_FIELDS = ("qid", "query_id")
_WINDOW_FIELDS = ("pred_relevant_windows", "moments")
_SALIENCY_FIELDS = ("pred_saliency_scores", "saliency")
_LARGEST = 1e300  # JSON knows integers that no float can hold


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundMoments:
    """What was found for each query, in the queries' order.

    Attributes:
        windows: Of each query (n, 3): start and end in seconds, and score; best first, perhaps none.
        saliency: Of each query (clips,) scores, or None where there are none.
    """

    windows: tuple[Floats, ...]
    saliency: tuple[Floats | None, ...]

    @property
    def num_tied(self) -> int:
        """Queries whose first window has the score of another, so that the order of the file decides."""
        return sum(len(rows) > 1 and bool(rows[0, 2] == rows[1, 2]) for rows in self.windows)


def read_predictions(path: Path, data: MomentSet) -> FoundMoments:
    """Read JSON lines, or a JSON list, of ``qid`` and ``pred_relevant_windows``.

    The windows of a query are a list of ``[start_s, end_s, score]``, sorted here by score, those of equal
    score in the order of the file; an empty list finds nothing. Beside them there may be
    ``pred_saliency_scores``, a number for each clip. ``query_id``, ``moments``, ``saliency`` mean the same.

    Raises:
        InvalidInput: The file cannot be read, does not answer every query exactly once, or holds for a query,
            which is named, something that is no window, is not finite, or ends before it begins.
    """
    text = read_text(path)
    what = "an object a line with qid and pred_relevant_windows"
    if text.lstrip().startswith("["):
        rows = parse_json(path, text, what)
    else:
        rows = [parse_json(path, line, what) for line in text.split("\n") if line.strip()]
    by_id: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        name = _field(row, _ID_FIELDS) if isinstance(row, dict) else None
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise InvalidInput(f"{path}: entry {number}: expected {what}, got {json.dumps(row):.120}")
        if str(name) in by_id:
            raise InvalidInput(f"{path}: query {str(name)!r} stands there twice")
        by_id[str(name)] = row
    _check_complete(path, list(by_id), data.query_ids)
    ordered = [by_id[name] for name in data.query_ids]
    named = list(zip(data.query_ids, ordered, strict=True))
    return FoundMoments(
        windows=tuple(_windows(path, name, _field(row, _WINDOW_FIELDS)) for name, row in named),
        saliency=tuple(_saliency(path, name, _field(row, _SALIENCY_FIELDS)) for name, row in named),
    )


def write_predictions(found: FoundMoments, data: MomentSet, path: Path) -> None:
    """Write what was found in the form that ``read_predictions`` reads.

    Raises:
        NoSpaceError: The disk is full; what was there before stays.
    """
    lines = []
    for place, (query_id, windows, scores) in enumerate(
        zip(data.query_ids, found.windows, found.saliency, strict=True)
    ):
        row: dict[str, Any] = {
            "qid": query_id,
            "query": data.queries[place],
            "vid": data.video_ids[int(data.query_video[place])],
            "pred_relevant_windows": windows.tolist(),
        }
        if scores is not None:
            row["pred_saliency_scores"] = scores.tolist()
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_durably(path, "".join(lines).encode())


def _field(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _check_complete(path: Path, given: Sequence[str], expected: Sequence[str]) -> None:
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        parts = [
            f"{len(names)} {what}, such as {', '.join(map(repr, names[:3]))}"
            for what, names in (
                (f"of {len(expected)} queries have no entry", missing),
                ("entries are of unknown queries", unknown),
            )
            if names
        ]
        raise InvalidInput(
            f"{path}: {'; '.join(parts)}; for which nothing was found, the list of windows is empty"
        )


def _windows(path: Path, query_id: str, value: Any) -> Floats:
    if not isinstance(value, list) or not all(_is_numbers(row) and len(row) == 3 for row in value):
        raise InvalidInput(
            f"{path}: query {query_id!r}: expected pred_relevant_windows, a list of [start_s, end_s, score], "
            f"all finite numbers, got {json.dumps(value):.120}"
        )
    rows = np.asarray(value, np.float64).reshape(-1, 3)
    wrong = np.flatnonzero(rows[:, 1] < rows[:, 0])
    if len(wrong):
        raise InvalidInput(
            f"{path}: query {query_id!r}: a window ends before it begins: {value[int(wrong[0])]}"
        )
    return rows[np.argsort(-rows[:, 2], kind="stable")]


def _saliency(path: Path, query_id: str, value: Any) -> Floats | None:
    if value is None:
        return None
    if not _is_numbers(value):
        raise InvalidInput(
            f"{path}: query {query_id!r}: expected pred_saliency_scores, a list of finite numbers, "
            f"got {json.dumps(value):.120}"
        )
    return np.asarray(value, np.float64)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= _LARGEST
        for number in value
    )
