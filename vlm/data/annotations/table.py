"""Tables with a column of videos and a column of captions: CSV, tab-separated values, Parquet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.annotations.rows import Annotation, read_text
from vlm.errors import DataError, MissingExtra

# in the order in which they are looked for; MSR-VTT's 1k-A file has video_id and sentence
VIDEO_COLUMNS = (
    "video",
    "file",
    "filename",
    "file_name",
    "path",
    "video_path",
    "video_id",
    "videoid",
    "image",
    "image_path",
)
CAPTION_COLUMNS = ("caption", "captions", "sentence", "text", "description", "title")
_ROWS_AT_ONCE = 4096


def read_csv(
    path: Path, video_column: str | None = None, caption_column: str | None = None
) -> list[Annotation]:
    """Read one caption a row; ``.tsv`` is separated by tabs. The other columns become metadata.

    Args:
        path: A file whose first row names the columns.
        video_column: Column of the videos' names; None takes the first of `VIDEO_COLUMNS` that is there.
        caption_column: Column of the captions; None takes the first of `CAPTION_COLUMNS` that is there.

    Raises:
        DataError: ``bad_annotations``.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(
        io.StringIO(read_text(path)), delimiter=delimiter, restkey="", restval="\0", strict=True
    )
    try:
        columns = _columns(path, reader.fieldnames or (), video_column, caption_column)
        return _annotations(path, ((reader.line_num, row) for row in reader), *columns)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}", "bad_annotations") from error


def read_parquet(
    path: Path, video_column: str | None = None, caption_column: str | None = None
) -> list[Annotation]:
    """Read a caption, or a list of captions, a row; arguments as of `read_csv`.

    Raises:
        MissingExtra: pyarrow is not installed.
        DataError: ``bad_annotations``.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "reading Parquet") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, video_column, caption_column)
            return _annotations(path, _parquet_rows(file), *columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}", "bad_annotations") from error


def _parquet_rows(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _columns(
    path: Path, names: Sequence[str], video_column: str | None, caption_column: str | None
) -> tuple[str, str]:
    found = []
    for asked, known in ((video_column, VIDEO_COLUMNS), (caption_column, CAPTION_COLUMNS)):
        name = next((column for column in ((asked,) if asked else known) if column in names), None)
        if name is None:
            wanted = repr(asked) if asked else f"one of {', '.join(known)}"
            raise DataError(
                f"{path}: expected the column {wanted}, got {', '.join(map(repr, names)) or 'no columns'}; "
                "say --video-column and --caption-column",
                "bad_annotations",
            )
        found.append(name)
    return found[0], found[1]


def _annotations(
    path: Path, rows: Iterable[tuple[int, Mapping[str, Any]]], video_column: str, caption_column: str
) -> list[Annotation]:
    found: list[Annotation] = []
    for number, row in rows:
        video, captions = row[video_column], row[caption_column]
        captions = [] if captions is None else captions
        captions = [captions] if isinstance(captions, str) else captions
        if isinstance(video, int):
            video = str(video)
        is_text = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
        if not isinstance(video, str) or not video or not is_text or "" in row or "\0" in row.values():
            raise DataError(
                f"{path}: row {number}: expected a video's name in {video_column!r}, a caption in "
                f"{caption_column!r} and as many cells as columns, got {dict(row)!r:.160}",
                "bad_annotations",
            )
        metadata = {
            name: _plain(value)
            for name, value in row.items()
            if name not in (video_column, caption_column) and value not in (None, "")
        }
        found.append(Annotation(video=video, captions=tuple(captions), metadata=metadata))
    return found


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it; dates, decimals and bytes become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value)
