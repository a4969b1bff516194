"""The files of a benchmark, opened without trusting them: JSON, JSON Lines, tables, lists; never pickles."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm.data.annotations.rows import read_text, split_lines
from vlm.errors import DataError

_PICKLES = frozenset({".pkl", ".pickle", ".p", ".pt", ".pth"})


class AnnotationFiles:
    """A file with its companions in the same folder, or a folder in which the usual names are looked for.

    Attributes:
        folder: Where companions lie.
        used: Every file that was opened through ``open``, in order.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"{path}: no such annotation file or folder", "missing")
        self._given = path
        self.folder = path if path.is_dir() else path.parent
        self.used: list[Path] = []

    def main(self, names: Iterable[str]) -> Path:
        """Return the file that was given, or the first of ``names`` in the folder that was given.

        Raises:
            DataError: The folder holds none of them (``missing``), or it is a pickle (``pickle``).
        """
        if self._given.is_file():
            return self._noted(self._given)
        names = tuple(names)
        found = self.companion(names)
        if found is None:
            pickled = [self.folder / Path(name).with_suffix(".pkl") for name in names]
            for path in pickled:
                if path.is_file():
                    refuse_pickle(path)
            raise DataError(f"{self.folder}: holds none of {', '.join(names) or 'the files'}", "missing")
        return found

    def companion(self, names: Iterable[str]) -> Path | None:
        """Return the first of ``names`` that lies beside the main file, None if there is none."""
        for name in names:
            path = self.folder / name
            if path.is_file() and path != self._given:
                return self._noted(path)
        return None

    def _noted(self, path: Path) -> Path:
        refuse_pickle(path)
        if path not in self.used:
            self.used.append(path)
        return path


def refuse_pickle(path: Path) -> None:
    """Raise if a file is a pickle by its name or its first bytes: reading one runs whatever it says.

    Raises:
        DataError: It is; the message says how to convert it (``pickle``).
    """
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix.lower() in _PICKLES or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        target = path.with_suffix(".json").name
        raise DataError(
            f"{path}: is a pickle, and reading one runs any code that is inside; if you trust who made it, "
            f'convert it once, in a place with nothing to lose: python -c "import json, pickle; '
            f"json.dump(pickle.load(open('{path.name}', 'rb')), open('{target}', 'w'))\", "
            f"then give {target}",
            "pickle",
        )


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, or the rows of a JSON Lines file as a list.

    Raises:
        DataError: It is neither (``bad_annotations``).
    """
    text = read_text(path)
    if path.suffix.lower() != ".jsonl":
        try:
            return json.loads(text)
        except ValueError as error:
            raise bad(path, f"not JSON: {error}") from error
    rows = []
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise bad(path, f"line {number} is not JSON: {error}") from error
    return rows


def load_ids(path: Path) -> list[str]:
    """Return the names in a list of videos: one a line, a JSON list, or a CSV with the one column video_id.

    Raises:
        DataError: It is not one, is empty, or names a video twice (``bad_annotations``).
    """
    if path.suffix.lower() == ".json":
        names = load_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise bad(path, "expected a JSON list of names")
    else:
        names = [line.strip() for line in split_lines(read_text(path)) if line.strip()]
        if path.suffix.lower() == ".csv" and names and names[0] == "video_id":
            names = names[1:]
    if not names or len(set(names)) < len(names):
        raise bad(path, f"expected different names of videos, got {len(names)}, {len(set(names))} different")
    return names


def bad(path: Path, what: str) -> DataError:
    """Return the error for a file that is not as its layout says."""
    return DataError(f"{path}: {what}", "bad_annotations")
