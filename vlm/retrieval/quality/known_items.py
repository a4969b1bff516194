"""Known items: texts and the moments that they should find, one a row of a CSV file."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import InvalidInput
from vlm.retrieval.catalog import VideoRow
from vlm.types import Duplicate, Hit

_REQUIRED, _OPTIONAL = ("query", "video"), ("start_s", "end_s")
_MOST_ROWS = 100_000
# what spreadsheets take for a formula; an apostrophe before it says that it is text
_FORMULA = re.compile(r"'*[=+\-@\uff1d\uff0b\uff0d\uff20]")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownItem:
    """A text and what it should find.

    Attributes:
        query: The text.
        video: Identifier or path of a video, as the file has it.
        start_s: Where the moment begins, in seconds; None if any moment of the video will do.
        end_s: Where it ends.
    """

    query: str
    video: str
    start_s: float | None = None
    end_s: float | None = None

    def is_found_by(self, hit: Hit, video_id: str) -> bool:
        """Whether a hit, or a copy that it names, is of that video and overlaps the item's times, if any."""
        places: tuple[Hit | Duplicate, ...] = (hit, *hit.duplicates)
        return any(
            one.video_id == video_id
            and (
                self.start_s is None
                or self.end_s is None
                or (one.start_s < self.end_s and self.start_s < one.end_s)
            )
            for one in places
        )


def read_known_items(path: Path) -> list[KnownItem]:
    """Read a CSV file with the columns query and video, and, if moments matter, start_s and end_s.

    Raises:
        InvalidInput: It cannot be read, holds no row, or is not such a file; the line is named.
    """
    try:
        items = parse_known_items(path.read_bytes(), path)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error
    if not items:
        raise InvalidInput(f"{path}: holds no queries; write one row a query: query,video,start_s,end_s")
    return items


def parse_known_items(content: bytes, path: Path) -> list[KnownItem]:
    """Return the rows of a file's content; `path` is only named in errors.

    Raises:
        InvalidInput: A column is missing or unknown, or a row says something impossible or is there twice.
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = tuple(reader.fieldnames or ())
        unknown = set(columns) - {*_REQUIRED, *_OPTIONAL}
        if unknown or not set(_REQUIRED) <= set(columns) or len(set(columns)) != len(columns):
            raise InvalidInput(
                f"{path}: expected the columns query, video and optionally start_s, end_s, got "
                f"{', '.join(map(repr, columns)) or 'nothing'}"
            )
        items = []
        for row in reader:
            items.append(_item(row, f"{path}, line {reader.line_num}"))
            if len(items) > _MOST_ROWS:
                raise InvalidInput(f"{path}: more than {_MOST_ROWS:,} rows")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error
    for twice, times in Counter(items).most_common(1):
        if times > 1:
            raise InvalidInput(
                f"{path}: the query {twice.query!r} for {twice.video!r} is there {times} times"
            )
    return items


def format_known_items(items: Iterable[KnownItem]) -> bytes:
    """Return the content that `parse_known_items` reads back exactly, and no spreadsheet runs as formulas."""
    stream = io.StringIO(newline="")
    # its line ends make the writer quote every kind of line break within a cell
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow((*_REQUIRED, *_OPTIONAL))
    for item in items:
        texts = [f"'{text}" if _FORMULA.match(text) else text for text in (item.query, item.video)]
        times = ["" if seconds is None else repr(seconds) for seconds in (item.start_s, item.end_s)]
        writer.writerow((*texts, *times))
    return stream.getvalue().encode()


def find_videos(items: Iterable[KnownItem], videos: Iterable[VideoRow], folder: Path) -> list[str | None]:
    """Return the identifier of each item's video, None where the index holds no such video.

    Args:
        items: What is looked for.
        videos: The videos of the index.
        folder: What relative paths start from.
    """
    names: dict[str, str] = {}
    for video in videos:
        names[os.fsdecode(video.path)] = video.video_id
    names.update({video_id: video_id for video_id in list(names.values())})
    return [names.get(item.video) or names.get(os.path.abspath(folder / item.video)) for item in items]


def _item(row: dict[str | None, str | None], place: str) -> KnownItem:
    if None in row or None in (row["query"], row["video"]):
        raise InvalidInput(f"{place}: expected as many cells as there are columns")
    texts = (str(row[name]).strip() for name in _REQUIRED)
    query, video = (text[1:] if text[:1] == "'" and _FORMULA.match(text) else text for text in texts)
    if not query or not video:
        raise InvalidInput(f"{place}: query and video must not be empty")
    start_s, end_s = (_seconds(row.get(name), name, place) for name in _OPTIONAL)
    if (start_s is None) != (end_s is None):
        raise InvalidInput(f"{place}: expected both start_s and end_s, or neither")
    if start_s is not None and end_s is not None and not 0 <= start_s < end_s:
        raise InvalidInput(f"{place}: expected 0 <= start_s < end_s, got {start_s:g} and {end_s:g}")
    return KnownItem(query=query, video=video, start_s=start_s, end_s=end_s)


def _seconds(text: str | None, name: str, place: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInput(f"{place}: {name} must be a number of seconds, got {text!r}")
    return value
