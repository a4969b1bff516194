"""Which captions belong to which videos, read from the layouts in use; one reader a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlm.data.annotations import folder, reference_json, table, world_manifest
from vlm.data.annotations.rows import Annotation, merge
from vlm.data.annotations.videos import Located, locate_videos
from vlm.errors import DataError

__all__ = [
    "LAYOUTS",
    "Annotation",
    "Located",
    "locate_videos",
    "merge",
    "read_annotations",
    "read_folder",
    "read_rows",
]

LAYOUTS: dict[str, Callable[[Path], list[Annotation]]] = {
    "reference": reference_json.read,
    "reference-paragraph": reference_json.read_paragraphs,
    "csv": table.read_csv,
    "parquet": table.read_parquet,
    "world": world_manifest.read,
}
_BY_SUFFIX = {
    ".json": "reference",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".jsonl": "world",
}

read_folder = folder.read


def read_annotations(
    path: Path | str,
    layout: str = "auto",
    *,
    video_column: str | None = None,
    caption_column: str | None = None,
) -> list[Annotation]:
    """Read an annotation file: one entry a video, its captions in the file's order, without doubles.

    Arguments and errors are those of `read_rows`.
    """
    return merge(read_rows(path, layout, video_column=video_column, caption_column=caption_column))


def read_rows(
    path: Path | str,
    layout: str = "auto",
    *,
    video_column: str | None = None,
    caption_column: str | None = None,
) -> list[Annotation]:
    """Read an annotation file row by row, as it is; a video may have several rows.

    Args:
        path: The file.
        layout: A key of `LAYOUTS`, or ``auto`` to go by the file's suffix.
        video_column: Of a table: the column of the videos' names; None looks for a usual name.
        caption_column: Of a table: the column of the captions; None looks for a usual name.

    Raises:
        DataError: The file is missing, or is not of the layout (``bad_annotations``).
        MissingExtra: The layout needs a package that is not installed.
        ValueError: There is no such layout, or columns are given for a layout without columns.
    """
    path = Path(path)
    if layout == "auto":
        layout = _BY_SUFFIX.get(path.suffix.lower(), "")
        if not layout:
            known: Sequence[str] = sorted(_BY_SUFFIX)
            raise DataError(f"{path}: expected one of {', '.join(known)}, or say --layout", "bad_annotations")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout in ("csv", "parquet"):
        read_table = table.read_csv if layout == "csv" else table.read_parquet
        return read_table(path, video_column, caption_column)
    if video_column or caption_column:
        raise ValueError(f"columns can be named for csv and parquet, not for the layout {layout!r}")
    return LAYOUTS[layout](path)
