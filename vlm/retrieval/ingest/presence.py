"""What lies in watched folders: a disk that is not mounted must not look like deleted files."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vlm.retrieval.ingest.scanning import scan_paths

State = tuple[int, int]


@dataclass(kw_only=True, slots=True)
class Look:
    """What one look at the watched folders found.

    Attributes:
        states: Size in bytes and modification time (ns) of every video file there.
        gone: Known files that are gone from folders that are there.
        away: Places that cannot be judged now, with the reason.
        num_kept: How many known files each of these places has, as far as that is known.
    """

    states: dict[Path, State] = field(default_factory=dict)
    gone: set[Path] = field(default_factory=set)
    away: dict[Path, str] = field(default_factory=dict)
    num_kept: Counter[Path] = field(default_factory=Counter)


class Places:
    """The watched folders from look to look; it remembers on which device each folder's files lay."""

    def __init__(self, index: Path) -> None:
        self._index = index
        self._devices: dict[Path, int] = {}

    def look(self, roots: Iterable[Path], known: Collection[Path]) -> Look:
        """Look at all of `roots`; `known` are the files that the index knows, indexed or rejected.

        A known file is gone only if nothing is there under its name, its root can be read and holds some
        video, and the disk on which it lay at an earlier look is still there. Files of no root are not gone.

        Raises:
            InvalidInput: A root vanished in this moment.
        """
        result, roots = Look(), set(roots)
        for root in roots:
            if (problem := _unreachable(root, root in known)) is not None:
                result.away[root] = problem
        present = [root for root in sorted(roots) if root not in result.away and os.path.lexists(root)]
        for file in scan_paths(present, self._index).files:
            if (state := state_of(file)) is not None:
                result.states[file] = state
        inhabited = {_root_of(file, roots) for file in result.states}
        missing: set[Path] = set()
        for file in known:
            home = None if file in result.states else _root_of(file, roots)
            if home is None or not (home in result.away or is_gone(file)):
                continue
            missing.add(file.parent)
            if home != file and home not in inhabited:
                result.away.setdefault(home, "holds no videos any more")
            place = home if home in result.away else self._other_disk(file)
            if place is None:
                result.gone.add(file)
            else:
                result.away.setdefault(place, "the disk that was there is not")
                result.num_kept[place] += 1
        self._remember({file.parent for file in result.states}, missing)
        return result

    def _other_disk(self, file: Path) -> Path | None:
        """Return the nearest folder that is there, if it lies on another device than the file did."""
        was = self._devices.get(file.parent)
        if was is None:
            return None
        place = next(folder for folder in file.parents if folder.is_dir())
        return None if device_of(place) == was else place

    def _remember(self, folders: Iterable[Path], missing: Collection[Path]) -> None:
        for folder in folders:
            # where something is missing, what was known before is what tells whether its disk is there
            device = device_of(folder)
            if device is not None and (folder not in missing or folder not in self._devices):
                self._devices[folder] = device


def state_of(file: Path) -> State | None:
    """Return size in bytes and modification time (ns) of a file; None if it cannot be had."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def is_gone(path: Path | bytes) -> bool:
    """Whether nothing is there under this name; a folder that cannot be read does not say so."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def device_of(folder: Path) -> int | None:
    """Return the number of the device on which a folder lies; None if that cannot be had."""
    try:
        return folder.stat().st_dev
    except OSError:
        return None


def _unreachable(root: Path, is_file: bool) -> str | None:
    """Return why a root cannot be judged; a file that was named outright is judged by its folder."""
    is_lost = is_file and is_gone(root)
    place = root.parent if is_lost else root
    try:
        if not stat.S_ISDIR(place.stat().st_mode):
            return None
        with os.scandir(place) as entries:
            is_empty = next(entries, None) is None
    except OSError as error:
        return error.strerror or str(error)
    return "its folder is empty" if is_lost and is_empty else None


def _root_of(file: Path, roots: Collection[Path]) -> Path | None:
    return next((place for place in (file, *file.parents) if place in roots), None)
