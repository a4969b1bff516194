"""MSR-VTT's 1k-A file: a CSV with the columns ``video_id`` and ``sentence``."""

from __future__ import annotations

import csv
from pathlib import Path

from vlm.data.annotations.rows import Annotation, read_text
from vlm.errors import DataError


def read(path: Path) -> list[Annotation]:
    """Read one caption a row; the names of the videos have no extension.

    Raises:
        DataError: ``bad_annotations``.
    """
    reader = csv.DictReader(read_text(path).splitlines(keepends=True))
    missing = {"video_id", "sentence"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(
            f"{path}: expected the columns video_id and sentence, got {reader.fieldnames}", "bad_annotations"
        )
    found: list[Annotation] = []
    try:
        for row in reader:
            if not row["video_id"] or row["sentence"] is None:
                raise DataError(
                    f"{path}: line {reader.line_num}: no video_id or no sentence", "bad_annotations"
                )
            found.append(Annotation(video=row["video_id"], captions=(row["sentence"],)))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}", "bad_annotations") from error
    return found
