"""Which captions belong to which videos, read from the layouts in use; one reader a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlm.data.annotations import folder, msrvtt, reference_json, world_manifest
from vlm.data.annotations.rows import Annotation, merge
from vlm.data.annotations.videos import Located, locate_videos
from vlm.errors import DataError

__all__ = ["LAYOUTS", "Annotation", "Located", "locate_videos", "merge", "read_annotations", "read_folder"]

LAYOUTS: dict[str, Callable[[Path], list[Annotation]]] = {
    "reference": reference_json.read,
    "reference-paragraph": reference_json.read_paragraphs,
    "msrvtt": msrvtt.read,
    "world": world_manifest.read,
}
_BY_SUFFIX = {".json": "reference", ".csv": "msrvtt", ".jsonl": "world"}

read_folder = folder.read


def read_annotations(path: Path | str, layout: str = "auto") -> list[Annotation]:
    """Read an annotation file: one entry a video, its captions in the file's order, without doubles.

    Args:
        path: The file.
        layout: A key of `LAYOUTS`, or ``auto`` to go by the file's suffix.

    Raises:
        DataError: The file is missing, or is not of the layout (``bad_annotations``).
        ValueError: There is no such layout.
    """
    path = Path(path)
    if layout == "auto":
        layout = _BY_SUFFIX.get(path.suffix.lower(), "")
        if not layout:
            known: Sequence[str] = sorted(_BY_SUFFIX)
            raise DataError(f"{path}: expected one of {', '.join(known)}, or say --layout", "bad_annotations")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return merge(LAYOUTS[layout](path))
