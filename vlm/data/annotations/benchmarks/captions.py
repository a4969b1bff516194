"""Captions of the retrieval benchmarks, in the layouts that their files circulate in, told by the content."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm.data.annotations.benchmarks import unified
from vlm.data.annotations.benchmarks.files import AnnotationFiles, bad, load_ids, load_json
from vlm.data.annotations.benchmarks.records import Captioned, merge_rows, video_key
from vlm.data.annotations.rows import read_text, split_lines
from vlm.data.annotations.table import read_csv

Rows = list[Captioned]
_LSMDC_COLUMNS = 6


def read_captions(
    files: AnnotationFiles, names: Sequence[str], *, lists: Sequence[str] = (), part: str | None = None
) -> Rows:
    """Read captions, and keep the videos of a list where one lies beside them.

    Args:
        files: The file that holds the captions, or its folder.
        names: What the file may be called in a folder.
        lists: What a list of the split's videos may be called.
        part: Value of ``split`` to keep, where the file has one.

    Returns:
        One row a video (or one row a caption of several videos), in the order of the list or of the file;
        captions as they are written, repeated ones included.

    Raises:
        DataError: A file is missing, is a pickle, is of no known layout, or lacks a listed video.
    """
    path = files.main(names)
    rows = merge_rows(_rows(path, part))
    if not rows:
        raise bad(path, "holds no captions" + (f" of the split {part!r}" if part else ""))
    chosen = files.companion(lists)
    return rows if chosen is None else _listed(rows, load_ids(chosen), path, chosen)


def _listed(rows: Rows, wanted: list[str], path: Path, chosen: Path) -> Rows:
    single = [row for row in rows if len(row.videos) == 1]
    by_name = {row.videos[0]: row for row in single}
    by_key = {video_key(row.videos[0]): row for row in single}
    found = {name: by_name.get(name) or by_key.get(video_key(name)) for name in wanted}
    absent = [name for name, row in found.items() if row is None]
    if absent:
        raise bad(
            path,
            f"{len(absent)} of the {len(wanted)} videos of {chosen.name} have no captions, "
            f"such as {', '.join(absent[:3])}",
        )
    # the list knows the file's extension, the captions often do not
    return [Captioned(videos=(name,), captions=row.captions) for name, row in found.items() if row]


def _rows(path: Path, part: str | None) -> Iterable[Captioned]:
    if path.suffix.lower() in (".json", ".jsonl"):
        value = load_json(path)
        read = _layout_of(path, value)
        try:
            return read(value, part)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise bad(path, f"an entry is not as its layout says: {error!r}") from error
    lines = split_lines(read_text(path))
    if lines and lines[0].count("\t") >= _LSMDC_COLUMNS - 1 and path.suffix.lower() != ".tsv":
        return _lsmdc(path, lines)
    return [Captioned(videos=(row.video,), captions=row.captions) for row in read_csv(path)]


def _layout_of(path: Path, value: Any) -> Callable[[Any, str | None], Rows]:
    """Return the reader of a JSON value, told by its outermost keys."""
    if isinstance(value, dict) and value:
        if unified.is_unified(value):
            return lambda found, _: unified.parse_captions(found)
        if "sentences" in value and "videos" in value:
            return _msrvtt_original
        if "annotations" in value:
            return _image_ids
        first = next(iter(value.values()))
        if isinstance(first, dict) and "sentences" in first:
            return _sentences
        return _text_lists if isinstance(first, dict) else _by_name
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for keys, read in _LISTS.items():
            if set(keys) <= set(value[0]):
                return read
    raise bad(path, "of no known layout of captions; see the documentation of vlm eval prepare")


def _reference(rows: Any, _part: str | None) -> Rows:
    return [Captioned(videos=_texts(row["video"]), captions=_texts(row["caption"])) for row in rows]


def _didemo(rows: Any, _part: str | None) -> Rows:
    return [Captioned(videos=_texts(row["video"]), captions=_texts(row["description"])) for row in rows]


def _vatex(rows: Any, _part: str | None) -> Rows:
    return [Captioned(videos=_texts(row["videoID"]), captions=_texts(row["enCap"])) for row in rows]


def _described(rows: Any, _part: str | None) -> Rows:
    return [Captioned(videos=_texts(row["video_id"]), captions=_texts(row["desc"])) for row in rows]


def _clip_names(rows: Any, _part: str | None) -> Rows:
    return [Captioned(videos=_texts(row["clip_name"]), captions=_texts(row["caption"])) for row in rows]


_LISTS: dict[tuple[str, ...], Callable[[Any, str | None], Rows]] = {
    ("video", "caption"): _reference,
    ("video", "description"): _didemo,
    ("videoID", "enCap"): _vatex,
    ("video_id", "desc"): _described,
    ("clip_name", "caption"): _clip_names,
}


def _msrvtt_original(value: Any, part: str | None) -> Rows:
    """MSR-VTT's own file; ``part`` picks by the split that each video carries."""
    kept = {row["video_id"] for row in value["videos"] if part is None or row["split"] == part}
    rows = sorted(value["sentences"], key=lambda row: int(row["sen_id"]))
    return [
        Captioned(videos=(row["video_id"],), captions=(row["caption"],))
        for row in rows
        if row["video_id"] in kept
    ]


def _image_ids(value: Any, _part: str | None) -> Rows:
    return [Captioned(videos=(row["image_id"],), captions=(row["caption"],)) for row in value["annotations"]]


def _sentences(value: Any, _part: str | None) -> Rows:
    """ActivityNet Captions: sentences of a video, in the order of time."""
    return [Captioned(videos=(name,), captions=_texts(row["sentences"])) for name, row in value.items()]


def _text_lists(value: Any, _part: str | None) -> Rows:
    """MDMMT's files: the captions of a video under ``text``; their ``start`` and ``end`` do not match."""
    return [Captioned(videos=(name,), captions=_texts(row["text"])) for name, row in value.items()]


def _by_name(value: Any, _part: str | None) -> Rows:
    """MSVD: name → captions, each a text or, in what was ``raw-captions.pkl``, a list of words."""
    rows = []
    for name, captions in value.items():
        texts = [caption if isinstance(caption, str) else " ".join(_texts(caption)) for caption in captions]
        rows.append(Captioned(videos=(name,), captions=_texts(texts)))
    return rows


def _lsmdc(path: Path, lines: list[str]) -> Rows:
    """LSMDC: six columns between tabs and no header; quotes are part of the sentence."""
    rows = []
    for number, cells in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        if len(cells) != _LSMDC_COLUMNS or not cells[0] or not cells[-1]:
            raise bad(
                path, f"line {number}: expected {_LSMDC_COLUMNS} columns between tabs, got {len(cells)}"
            )
        rows.append(Captioned(videos=(cells[0],), captions=(cells[-1],)))
    return rows


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"expected texts, got {value!r:.80}")
    return texts
