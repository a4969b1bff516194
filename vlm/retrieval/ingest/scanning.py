"""Which files lie under the paths asked for, and how a video is called."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vlm.errors import InvalidInput

_VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *(
            "3g2",
            "3gp",
            "apng",
            "asf",
            "avi",
            "dv",
            "f4v",
            "flv",
            "gif",
            "h264",
            "h265",
            "hevc",
            "ivf",
            "m1v",
        ),
        *(
            "m2ts",
            "m2v",
            "m4v",
            "mjpeg",
            "mjpg",
            "mkv",
            "mov",
            "mp4",
            "mpe",
            "mpeg",
            "mpg",
            "mts",
            "mxf",
            "nut",
        ),
        *("obu", "ogm", "ogv", "qt", "rm", "rmvb", "ts", "vob", "webm", "webp", "wmv", "wtv", "y4m"),
    )
)


@dataclass(kw_only=True, slots=True)
class Scan:
    """The video files under the paths asked for, sorted; and what else lay there, by suffix."""

    files: list[Path] = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)


def scan_paths(paths: Iterable[Path | str], exclude: Path, first: str | None = None) -> Scan:
    """Find the video files among files and folders; a file named outright is taken whatever its name.

    Args:
        paths: Files and folders.
        exclude: An index, which is not looked into, nor is the folder of its tasks.
        first: ``recent`` lists the files that changed last first, the path of a folder or file what lies
            there; the others follow, by path.

    Raises:
        InvalidInput: A path does not exist, or nothing was found where `first` says.
    """
    scan = Scan()
    found: set[Path] = set()
    exclude = Path(os.path.abspath(exclude))
    skipped = {exclude, tasks_folder(exclude)}
    for path in paths:
        absolute = Path(os.path.abspath(path))
        if absolute.is_dir():
            _scan_folder(absolute, skipped, found, scan.other_files)
        elif os.path.lexists(absolute):
            found.add(absolute)
        else:
            raise InvalidInput(f"{os.fspath(path)!r}: no such file or folder")
    scan.files = sorted(found, key=os.fsencode)
    if first == "recent":
        scan.files.sort(key=_changed, reverse=True)
    elif first is not None:
        place = Path(os.path.abspath(first))
        if not any(file.is_relative_to(place) for file in scan.files):
            raise InvalidInput(f"{first!r}: none of the videos lies there; it cannot come first")
        scan.files.sort(key=lambda file: not file.is_relative_to(place))
    return scan


def tasks_folder(index: Path) -> Path:
    """Return where the tasks of an index lie (`vlm.retrieval.engines`): beside it."""
    return index.with_name(f"{index.name}.tasks")


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _scan_folder(root: Path, skipped: set[Path], found: set[Path], other_files: Counter[str]) -> None:
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and here / n not in skipped]
        for name in names:
            suffix = Path(name).suffix.lower()
            if not name.startswith(".") and suffix in _VIDEO_SUFFIXES:
                found.add(here / name)
            else:
                other_files[suffix or name[:20]] += 1


def domain_of(tags: dict[str, str]) -> str:
    """Return which world a container's metadata says it shows; ``open`` for ordinary footage."""
    for key in ("comment", "title"):
        if tags.get(key, "").startswith("digit-world"):
            return "digit-world"
    return "open"


def assign_video_id(path: Path, taken: set[str]) -> str:
    """Return a short stable identifier for a path; a longer one if it is taken."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return next(digest[:n] for n in range(12, 65) if digest[:n] not in taken)
