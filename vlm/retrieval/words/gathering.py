"""The words that belong to a video: of its path and its tags, and of the files that lie beside it."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.retrieval.catalog import VideoRow

_TAGS = (
    "title", "comment", "description", "synopsis", "artist", "author", "album", "genre", "keywords", "show",
    "location", "date", "com.apple.quicktime.description", "com.apple.quicktime.keywords",
)  # fmt: skip
_MAX_TAG_CHARACTERS = 4000
_MAX_FILE_BYTES = 4 << 20
_FOLDERS = 3
_WINDOW_S = 10.0
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_CUE = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}")
_BESIDE = re.compile(r"\.info\.json|(?:\.[A-Za-z-]{2,12})?\.(?:srt|vtt|txt|description)")
_MARKUP = re.compile(r"<[^<>\n]*>|\{\\[^{}\n]*\}")


@dataclass(frozen=True, slots=True)
class Passage:
    """Words, and the seconds of the video that they are about; the whole video if these are None."""

    text: str
    start_s: float | None = None
    end_s: float | None = None


def keep_tags(tags: Mapping[str, str]) -> str:
    """Return the tags of a container that say something, as JSON, bounded."""
    kept = {name: tags[name] for name in _TAGS if tags.get(name, "").strip()}
    while kept and len(json.dumps(kept)) > _MAX_TAG_CHARACTERS:
        kept.popitem()
    return json.dumps(kept)


def passages_of(video: VideoRow, listings: dict[Path, list[str]]) -> Iterator[Passage]:
    """Yield what is written about a video; files that cannot be read are as if they were not there.

    Args:
        video: Which.
        listings: What lies in the folders looked into so far; grows.
    """
    path = Path(os.fsdecode(video.path))
    yield Passage(" ".join(_spelt_out(name) for name in (*path.parts[-1 - _FOLDERS : -1], path.stem)))
    if tags := json.loads(video.tags):
        yield Passage(" ".join(str(value) for value in tags.values()))
    for name in _beside(path, listings):
        content = _read(path.with_name(name))
        if name.endswith((".srt", ".vtt")):
            yield from parse_subtitles(content)
        elif name.endswith(".info.json"):
            yield Passage(_told(content))
        else:
            yield Passage(content)


def parse_subtitles(content: str) -> Iterator[Passage]:
    """Yield the cues of SubRip or WebVTT text, put together to stretches of about ten seconds."""
    words: list[str] = []
    start_s = end_s = 0.0
    is_cue = False
    for line in [*content.splitlines(), "", "99:59:59.999 --> 99:59:59.999"]:
        match = _CUE.match(line)
        if match is not None:
            begin, stop = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
            if words and (stop - start_s > _WINDOW_S or begin < start_s):
                yield Passage(" ".join(words), start_s, end_s)
                words = []
            if not words:
                start_s = begin
            end_s, is_cue = max(stop, begin), True
        elif not line.strip():
            is_cue = False
        elif is_cue:
            words.append(_MARKUP.sub(" ", line).strip())


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{fraction}")


def _beside(path: Path, listings: dict[Path, list[str]]) -> list[str]:
    """Return the names of a video's files: its own name, then perhaps a language, then a suffix."""
    stem, folder = path.stem, path.parent
    if folder not in listings:
        try:
            listings[folder] = sorted(os.listdir(folder))
        except OSError:
            listings[folder] = []
    found = []
    for name in listings[folder][bisect_left(listings[folder], stem) :]:
        if not name.startswith(stem):
            break
        if _BESIDE.fullmatch(name, len(stem)):
            found.append(name)
    return found


def _read(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            return ""
        content = path.read_bytes()
    except OSError:
        return ""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _told(content: str) -> str:
    """Return title, description and keywords of what downloaders write beside a video."""
    try:
        values = json.loads(content)
        parts = [values.get("title"), values.get("description"), *(values.get("tags") or ())]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""
    return " ".join(part for part in parts if isinstance(part, str))


def _spelt_out(name: str) -> str:
    """Return a name with what separates its words turned into spaces: HolidayParis_2019-beach."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])", " ", name)
    return re.sub(r"[\W_]+", " ", spaced)
