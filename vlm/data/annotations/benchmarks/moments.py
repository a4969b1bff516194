"""Queries with the stretches of a video that they are true of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.annotations.benchmarks import unified
from vlm.data.annotations.benchmarks.files import AnnotationFiles, bad, load_json
from vlm.data.annotations.benchmarks.records import Moment
from vlm.data.annotations.rows import read_text, split_lines

_CHARADES = re.compile(r"(?P<video>\S+) (?P<start>[\d.]+) (?P<end>[\d.]+)\s*##\s*(?P<query>.+)")


def read_moments(files: AnnotationFiles, names: Sequence[str]) -> list[Moment]:
    """Read queries and their windows.

    Layouts: QVHighlights' and Lighthouse's JSON Lines, Charades-STA's text file (``ID start end##query``),
    ActivityNet Captions. Windows stay as they are written, empty ones and those beyond the end too. What
    people thought of single clips is read where it stands (QVHighlights' ``saliency_scores``).

    Args:
        files: The file that holds the queries, or its folder.
        names: What the file may be called in a folder.

    Raises:
        DataError: The file is missing, is a pickle, has no windows (QVHighlights' test file), or is of no
            known layout.
    """
    path = files.main(names)
    if path.suffix.lower() == ".txt":
        found = _charades(path)
    else:
        value = load_json(path)
        try:
            found = _parse(path, value)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise bad(path, f"a query is not as its layout says: {error!r}") from error
    if not found:
        raise bad(path, "holds no queries")
    return found


def _parse(path: Path, value: Any) -> list[Moment]:
    if unified.is_unified(value):
        return unified.parse_moments(value)
    if isinstance(value, dict):
        return [
            Moment(
                video=name,
                query=sentence.strip(),
                query_id=f"{name}_{place}",
                duration_s=float(row["duration"]),
                windows=((float(window[0]), float(window[1])),),
            )
            for name, row in value.items()
            for place, (window, sentence) in enumerate(zip(row["timestamps"], row["sentences"], strict=True))
        ]
    if not isinstance(value, list) or not value:
        raise bad(path, "of no known layout of moments")
    if "relevant_windows" not in value[0]:
        raise bad(path, "has no relevant_windows; the labels of this part were not published")
    return [
        Moment(
            video=row["vid"],
            query=row["query"],
            query_id=str(row["qid"]),
            duration_s=float(row["duration"]),
            windows=tuple((float(start), float(end)) for start, end in row["relevant_windows"]),
            ratings=_ratings(row),
        )
        for row in value
    ]


def _ratings(row: Mapping[str, Any]) -> tuple[tuple[int, tuple[float, ...]], ...]:
    if "saliency_scores" not in row:
        return ()
    pairs = zip(row["relevant_clip_ids"], row["saliency_scores"], strict=True)
    return tuple((int(clip), tuple(map(float, scores))) for clip, scores in pairs)


def _charades(path: Path) -> list[Moment]:
    found = []
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if not line.strip():
            continue
        match = _CHARADES.fullmatch(line.strip())
        if match is None:
            raise bad(path, f"line {number}: expected 'ID start end##query', got {line!r:.80}")
        window = (float(match["start"]), float(match["end"]))
        found.append(
            Moment(
                video=match["video"],
                query=match["query"],
                query_id=str(number),
                duration_s=None,
                windows=(window,),
            )
        )
    return found
