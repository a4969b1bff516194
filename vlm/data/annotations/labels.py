"""Which class each video belongs to, read from the layouts in use."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeAlias

from vlm.data.annotations.folder import read as read_folder
from vlm.data.annotations.rows import Annotation, read_text, split_lines
from vlm.data.annotations.table import VIDEO_COLUMNS
from vlm.data.annotations.videos import locate_videos
from vlm.errors import DataError

LabelLayout: TypeAlias = Literal[
    "auto", "lines", "table", "kinetics", "ssv2", "coin", "breakfast", "lvu", "folder"
]
_LABEL_COLUMNS = ("label", "class", "class_name", "label_id", "class_id")
_LVU = ("class_id", "class_name", "youtube_id")
_WITH_PARTS = ("kinetics", "coin")
_KINETICS = ("label", "youtube_id", "time_start", "time_end")


class Labelled(NamedTuple):
    """A video by name and its class, by number or by name."""

    video: str
    label: int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSet:
    """Videos with their classes.

    Attributes:
        names: Of the videos, unique.
        paths: Their files; None where there is none.
        reasons: Why there is none; empty where there is one.
        labels: Number of each video's class.
        classes: Names of the classes; their numbers as text where no file names them.
    """

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    reasons: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def annotations(self) -> list[Annotation]:
        """Return the videos as they are packed, the name of its class the caption of each."""
        return [
            Annotation(video=name, captions=(self.classes[label],), label=label)
            for name, label in zip(self.names, self.labels, strict=True)
        ]


def read_labelled(
    path: Path | str,
    videos: Path | str,
    *,
    layout: LabelLayout = "auto",
    part: str | None = None,
    classes: Sequence[str] | Path | str | None = None,
) -> LabelledSet:
    """Read the labels of videos and find their files.

    Args:
        path: A file, or for the layout ``folder`` a folder that holds a folder of videos for each class.
        videos: Folder that the names are relative to.
        layout: How the labels are written:

            ``lines``: ``path label``, separated by a comma or by the last space; more columns are ignored.
            ``table``: CSV whose first row names the columns.
            ``kinetics``: The official CSV; a video is called ``ID_000012_000022``.
            ``ssv2``: Something-Something V2's JSON; the class is the template without brackets.
            ``coin``: COIN.json; ``part`` is ``training`` or ``testing``.
            ``breakfast``: One path a line; the class is the last part of its name, ``…_cereals.avi``.
            ``lvu``: One of LVU's tasks, columns parted by spaces; the class is its number, as two may share
            a name.
            ``folder``: see ``path``.
            ``auto``: goes by the content.
        part: Of several in one file, of the layouts ``kinetics`` and ``coin``; None takes all.
        classes: Names of the classes in order, or a file with them, see `read_classes`; None takes the names
            in the labels, sorted, or numbers from 0 to the largest.

    Raises:
        DataError: A file cannot be read, is not of the layout, holds nothing, has no parts although one is
            asked for, says two classes of one video, or one that is not in ``classes`` (``bad_annotations``).
    """
    path = Path(path)
    kind = _guess(path) if layout == "auto" else layout
    rows = _rows(path, kind, part)
    if not rows:
        where = f"{path}, part {part}" if part else str(path)
        raise DataError(f"{where}: holds no labelled video", "bad_annotations")
    merged: dict[str, int | str] = {}
    for video, label in rows:
        if merged.setdefault(video, label) != label:
            raise DataError(
                f"{path}: {video} has two labels, {merged[video]!r} and {label!r}", "bad_annotations"
            )
    names = read_classes(classes) if isinstance(classes, Path | str) else classes
    known = _class_names(merged.values()) if names is None else tuple(names)
    numbers = _numbers(path, merged, known)
    root = path if kind == "folder" else Path(videos)
    located = locate_videos((Annotation(video=video, captions=()) for video in merged), root)
    return LabelledSet(
        names=tuple(merged),
        paths=tuple(entry.path for entry in located),
        reasons=tuple(entry.reason for entry in located),
        labels=numbers,
        classes=known,
    )


def read_classes(path: Path | str) -> tuple[str, ...]:
    """Read names of classes in the order of their numbers.

    A JSON file holds a list, or an object from names to numbers; other files one class a line, as ``name`` or
    as ``number,name`` (with or without a first row ``id,name``).

    Raises:
        DataError: The file cannot be read, or numbers are not 0, 1, 2, ... (``bad_annotations``).
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix.lower() == ".json":
        names, numbers = _json_classes(path, text)
    else:
        rows = [row for row in csv.reader(split_lines(text)) if row]
        if rows and len(rows[0]) == 2 and not rows[0][0].isdigit():
            rows = rows[1:]
        if rows and all(len(row) == 2 and row[0].isdigit() for row in rows):
            rows.sort(key=lambda row: int(row[0]))
            names, numbers = [row[1].strip() for row in rows], [int(row[0]) for row in rows]
        else:
            names = [line.strip() for line in split_lines(text) if line.strip()]
            numbers = list(range(len(names)))
    if not names or numbers != list(range(len(names))) or len(set(names)) != len(names):
        raise DataError(
            f"{path}: expected different names of classes with the numbers 0, 1, 2, ...", "bad_annotations"
        )
    return tuple(map(str, names))


def _json_classes(path: Path, text: str) -> tuple[list[str], list[int]]:
    value = _json(path, text)
    try:
        pairs = [(name, int(number)) for name, number in value.items()] if isinstance(value, dict) else None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: expected a number for each class: {error}", "bad_annotations") from error
    if pairs is None:
        names = value if isinstance(value, list) else []
        return names, list(range(len(names)))
    pairs.sort(key=lambda pair: pair[1])
    return [name for name, _ in pairs], [number for _, number in pairs]


def _rows(path: Path, kind: str, part: str | None) -> list[Labelled]:
    if part is not None and kind not in _WITH_PARTS:
        raise DataError(
            f"{path}: the layout {kind!r} has no parts, got part {part!r}; leave it out, or name a layout "
            f"that has some: {', '.join(_WITH_PARTS)}",
            "bad_annotations",
        )
    return READERS[kind](path, part)


def _guess(path: Path) -> LabelLayout:
    if path.is_dir():
        return "folder"
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return "coin" if isinstance(_json(path, text), dict) else "ssv2"
    first = next((line for line in split_lines(text) if line.strip()), "")
    header = [cell.strip() for cell in next(csv.reader([first]), [])]
    if set(_KINETICS) <= set(header):
        return "kinetics"
    if set(_LVU) <= set(first.split()):
        return "lvu"
    if set(header) & set(_LABEL_COLUMNS) and set(header) & set(VIDEO_COLUMNS):
        return "table"
    return "lines" if len(_cells(first)) > 1 else "breakfast"


def _lines(path: Path, _part: str | None) -> list[Labelled]:
    found: list[Labelled] = []
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if not line.strip():
            continue
        cells = _cells(line)
        if len(cells) < 2:
            raise DataError(
                f"{path}: line {number}: expected a path and a label, got {line!r:.120}", "bad_annotations"
            )
        if not found and _is_header(cells):
            raise DataError(
                f"{path}: line {number} names columns, got {line!r:.120}; expected a path and a label, or "
                f"one column of {', '.join(VIDEO_COLUMNS)} and one of {', '.join(_LABEL_COLUMNS)}",
                "bad_annotations",
            )
        found.append(Labelled(cells[0], _label(cells[1])))
    return found


def _is_header(cells: Sequence[str]) -> bool:
    first, second = cells[0].lower(), cells[1].lower()
    names_first = first in VIDEO_COLUMNS + _LABEL_COLUMNS and not second.isdigit()
    return names_first or second in _LABEL_COLUMNS


def _cells(line: str) -> list[str]:
    by_comma = [cell.strip() for cell in next(csv.reader([line]))]
    return by_comma if len(by_comma) > 1 else line.strip().rsplit(None, 1)


def _table(path: Path, _part: str | None) -> list[Labelled]:
    reader = csv.DictReader(split_lines(read_text(path)))
    header = reader.fieldnames or ()
    video = next((name for name in VIDEO_COLUMNS if name in header), None)
    label = next((name for name in _LABEL_COLUMNS if name in header), None)
    if video is None or label is None:
        raise DataError(
            f"{path}: expected one column of {', '.join(VIDEO_COLUMNS)} and one of "
            f"{', '.join(_LABEL_COLUMNS)}, got {', '.join(header)}",
            "bad_annotations",
        )
    rows = list(reader)
    if any(not row[video] or not row[label] for row in rows):
        raise DataError(f"{path}: a row has no {video} or no {label}", "bad_annotations")
    return [Labelled(row[video], _label(row[label])) for row in rows]


def _kinetics(path: Path, part: str | None) -> list[Labelled]:
    reader = csv.DictReader(split_lines(read_text(path)))
    try:
        return [
            Labelled(
                f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}", row["label"]
            )
            for row in reader
            if part is None or row["split"] == part
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: line {reader.line_num}: expected {', '.join(_KINETICS)}: {error!r}", "bad_annotations"
        ) from error


def _ssv2(path: Path, _part: str | None) -> list[Labelled]:
    rows = _json(path, read_text(path))
    try:
        return [Labelled(str(row["id"]), row["template"].replace("[", "").replace("]", "")) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected a list of objects with id and template: {error!r}", "bad_annotations"
        ) from error


def _coin(path: Path, part: str | None) -> list[Labelled]:
    value = _json(path, read_text(path))
    try:
        return [
            Labelled(video, entry["class"])
            for video, entry in value["database"].items()
            if part is None or entry["subset"] == part
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected COIN's database of videos with class and subset: {error!r}", "bad_annotations"
        ) from error


def _breakfast(path: Path, _part: str | None) -> list[Labelled]:
    names = [line.strip() for line in split_lines(read_text(path)) if line.strip()]
    return [Labelled(name, PurePosixPath(name).stem.rpartition("_")[2]) for name in names]


def _lvu(path: Path, _part: str | None) -> list[Labelled]:
    header, *rows = [line.split() for line in split_lines(read_text(path)) if line.strip()] or [[]]
    wrong = next((row for row in rows if len(row) != len(header)), None)
    if not set(_LVU) <= set(header) or wrong:
        raise DataError(
            f"{path}: expected columns {', '.join(_LVU)}, got {wrong or header}", "bad_annotations"
        )
    number, video = header.index("class_id"), header.index("youtube_id")
    return [Labelled(row[video], _label(row[number])) for row in rows]


def _folder(path: Path, _part: str | None) -> list[Labelled]:
    names = [PurePosixPath(entry.video) for entry in read_folder(path)]
    return [Labelled(str(name), name.parts[0]) for name in names if len(name.parts) > 1]


READERS: dict[str, Callable[[Path, str | None], list[Labelled]]] = {
    "lines": _lines,
    "table": _table,
    "kinetics": _kinetics,
    "ssv2": _ssv2,
    "coin": _coin,
    "breakfast": _breakfast,
    "lvu": _lvu,
    "folder": _folder,
}


def _label(text: str) -> int | str:
    text = text.strip()
    return int(text) if text.isdigit() else text


def _class_names(labels: Iterable[int | str]) -> tuple[str, ...]:
    values = set(labels)
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        return tuple(map(str, range(max(numbers) + 1)))
    return tuple(sorted(map(str, values)))


def _numbers(path: Path, labels: dict[str, int | str], classes: Sequence[str]) -> tuple[int, ...]:
    place = {name: number for number, name in enumerate(classes)}
    found = []
    for video, label in labels.items():
        number = place.get(str(label), label)  # a number that is no name is the number of a class
        if not isinstance(number, int) or number >= len(classes):
            raise DataError(
                f"{path}: {video} is labelled {label!r}, which is none of the {len(classes)} classes",
                "bad_annotations",
            )
        found.append(number)
    return tuple(found)


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", "bad_annotations") from error
