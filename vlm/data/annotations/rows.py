"""What every layout is read into."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """A video or picture by name and what is said of it.

    Attributes:
        video: Name relative to the folder of videos; some layouts leave the extension out.
        captions: Each one true of the whole video.
        metadata: What else the annotation says, such as the scene of a rendered clip.
        label: Number of its class, if it has one.
    """

    video: str
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    label: int | None = None


def merge(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Join the entries of each video in order of appearance, dropping empty and repeated captions."""
    merged: dict[str, Annotation] = {}
    for entry in annotations:
        before = merged.get(entry.video)
        captions = dict.fromkeys([*(before.captions if before else ()), *map(str.strip, entry.captions)])
        captions.pop("", None)
        metadata = {**entry.metadata, **(before.metadata if before else {})}
        merged[entry.video] = Annotation(video=entry.video, captions=tuple(captions), metadata=metadata)
    return list(merged.values())


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text without their ends, which are ``\n``, ``\r\n`` and ``\r``.

    ``str.splitlines`` ends them also at U+2028, U+0085 and form feeds, which may stand inside a caption.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_text(path: Path) -> str:
    """Return the file's text; a byte order mark is dropped.

    Raises:
        DataError: It is missing or not UTF-8 (``bad_annotations``).
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}", "bad_annotations") from error
