"""The layout of VideoMamba's, UMT's and VindLU's files: a JSON list of ``{"video": ..., "caption": ...}``.

Pictures are named by ``image`` instead of ``video``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.data.annotations.rows import Annotation, read_text
from vlm.errors import DataError


def read(path: Path) -> list[Annotation]:
    """Read captions; where ``caption`` is a list, each item is a caption of its own.

    ``video`` may be a list too: the caption is true of each.

    Raises:
        DataError: ``bad_annotations``.
    """
    return _read(path, join=False)


def read_paragraphs(path: Path) -> list[Annotation]:
    """Read captions; where ``caption`` is a list, its items are joined with spaces into one text.

    Raises:
        DataError: ``bad_annotations``.
    """
    return _read(path, join=True)


def _read(path: Path, join: bool) -> list[Annotation]:
    text = read_text(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", "bad_annotations") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: expected a JSON list of objects with video and caption, got {type(rows).__name__}",
            "bad_annotations",
        )
    found: list[Annotation] = []
    for number, row in enumerate(rows):
        videos = _strings(row.get("video", row.get("image")) if isinstance(row, dict) else None)
        captions = _strings(row.get("caption") if isinstance(row, dict) else None)
        if not videos or not captions:
            raise DataError(
                f"{path}: item {number}: expected video and caption (text or lists), got {row!r:.120}",
                "bad_annotations",
            )
        captions = [" ".join(captions)] if join else captions
        metadata = {key: value for key, value in row.items() if key not in ("video", "image", "caption")}
        found.extend(Annotation(video=v, captions=tuple(captions), metadata=metadata) for v in videos)
    return found


def _strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        return []
    return values
