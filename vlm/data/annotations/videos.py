"""Find the file of each annotated video or picture, and say which are missing."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vlm.data.annotations.rows import Annotation
from vlm.data.shards.layout import EXTENSIONS, Media

# the order in which a name without extension is tried; the rest of the known ones follow
_FIRST_TRIED = ("mp4", "webm", "mkv", "avi", "mov", "jpg", "png")


class Located(NamedTuple):
    """An annotation with its file, or with the reason why there is none (``missing``, ``unsafe_name``)."""

    annotation: Annotation
    path: Path | None
    reason: str = ""


def locate_videos(
    annotations: Iterable[Annotation], folder: Path | str, media: Media = "video"
) -> list[Located]:
    """Look for each file below a folder: by its name, else by its name with an extension of the media.

    A name that leaves the folder (absolute, or with ``..``) is not looked for.
    """
    root = Path(folder)
    first = [extension for extension in _FIRST_TRIED if extension in EXTENSIONS[media]]
    tried = [*first, *sorted(EXTENSIONS[media] - set(first))]
    return [_locate(annotation, root, tried) for annotation in annotations]


def _locate(annotation: Annotation, root: Path, extensions: list[str]) -> Located:
    name = PurePosixPath(annotation.video)
    if name.is_absolute() or ".." in name.parts or not name.name or "\0" in annotation.video:
        return Located(annotation, None, "unsafe_name")
    path = root / name
    if _is_file(path):
        return Located(annotation, path)
    for extension in extensions:
        candidate = path.with_name(f"{path.name}.{extension}")
        if _is_file(candidate):
            return Located(annotation, candidate)
    return Located(annotation, None, "missing")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a name that no file can have is one of no file
            raise
        return False
