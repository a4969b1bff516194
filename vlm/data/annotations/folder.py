"""A folder of videos (or pictures) with captions beside them: ``clip.mp4`` and ``clip.txt`` or ``.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlm.data.annotations.rows import Annotation, merge, read_text, split_lines
from vlm.data.shards.layout import EXTENSIONS, Media
from vlm.errors import DataError


def read(folder: Path | str, media: Media = "video") -> list[Annotation]:
    """Find every video (or picture) below a folder, in order of name, with the captions that lie beside it.

    A ``.txt`` holds one caption a line; a ``.json`` is a text, a list of texts, or an object whose
    ``caption`` or ``captions`` is one of these and whose rest is metadata. A video without either has no
    captions; blank ones and repeated ones do not count.

    Raises:
        DataError: There is no such folder (``missing``), or a sidecar cannot be read (``bad_annotations``).
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", "missing")
    found: list[Annotation] = []
    for parent, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            if path.suffix[1:].lower() in EXTENSIONS[media]:
                captions, metadata = _sidecar(path)
                video = path.relative_to(root).as_posix()
                found.append(Annotation(video=video, captions=tuple(captions), metadata=metadata))
    return merge(found)


def _sidecar(video: Path) -> tuple[list[str], dict[str, Any]]:
    text, structured = video.with_suffix(".txt"), video.with_suffix(".json")
    if structured.is_file():
        return _structured(structured)
    if text.is_file():
        return split_lines(read_text(text)), {}
    return [], {}


def _structured(path: Path) -> tuple[list[str], dict[str, Any]]:
    metadata: dict[str, Any] = {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", "bad_annotations") from error
    if isinstance(value, dict):
        captions = value.get("captions", value.get("caption", []))
        metadata = {key: item for key, item in value.items() if key not in ("caption", "captions")}
    else:
        captions = value
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(item, str) for item in captions):
        raise DataError(f"{path}: expected a caption or a list of captions", "bad_annotations")
    return captions, metadata
