"""Where the videos of a benchmark lie: by their name, by their name with another extension, at any depth."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from vlm.data.annotations.benchmarks.records import video_key
from vlm.data.shards.layout import VIDEO_EXTENSIONS


class VideoFolder:
    """A folder of videos, listed once.

    A name is looked for as it is, then among all files below the folder by its key (see ``video_key``), with
    and without each of ``prefixes``: ActivityNet's files are called ``v_ID`` or ``ID``.
    """

    def __init__(self, folder: Path, prefixes: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self._prefixes = prefixes
        self._by_key: dict[str, list[Path]] = {}
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                if name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS or name.endswith("."):
                    self._by_key.setdefault(video_key(name), []).append(Path(parent, name))

    def find(self, name: str) -> tuple[Path | None, str]:
        """Return the video's file and "", or None and why: ``missing``, ``unsafe_name``, ``ambiguous``."""
        path = PurePosixPath(name)
        if ".." in path.parts or not path.name or "\0" in name:
            return None, "unsafe_name"
        if not path.is_absolute() and (self.folder / path).is_file():
            return self.folder / path, ""
        key = video_key(path.name)
        keys = [key]
        for prefix in self._prefixes:
            keys.append(key.removeprefix(prefix) if key.startswith(prefix) else prefix + key)
        for wanted in keys:
            found = self._by_key.get(wanted, [])
            if len(found) == 1:
                return found[0], ""
            if found:
                return None, "ambiguous"
        return None, "missing"
