"""The manifest of ``vlm data world``: JSON Lines, one clip a line, with its scene."""

from __future__ import annotations

import json
from pathlib import Path

from vlm.data.annotations.rows import Annotation, read_text, split_lines
from vlm.errors import DataError


def read(path: Path) -> list[Annotation]:
    """Read ``file``, ``captions`` (a list) and ``caption``; the rest of the line becomes metadata.

    Raises:
        DataError: ``bad_annotations``.
    """
    found: list[Annotation] = []
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            video, captions = row.pop("file"), row.pop("captions", None) or []
            if not captions or "caption" in row:
                captions = [*captions, row.pop("caption")]
            if not isinstance(video, str) or not all(isinstance(caption, str) for caption in captions):
                raise TypeError("file and caption must be text")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}: line {number}: expected a clip with file and caption: {error!r}", "bad_annotations"
            ) from error
        found.append(Annotation(video=video, captions=tuple(captions), metadata=row))
    return found
