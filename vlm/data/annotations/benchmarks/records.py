"""What the annotations of a public benchmark are read into: captions, questions, moments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

from vlm.data.shards.layout import VIDEO_EXTENSIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """Captions, each true of every one of the videos; mostly one video with one or several captions."""

    videos: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a video.

    Attributes:
        video: Name of the video.
        text: The question; empty if each candidate is a full statement.
        answers: The right answers in words.
        question_id: As the file numbers it, or its place in the file.
        kind: What is asked for, such as ``what``; empty if the file does not say.
        candidates: What to choose from; empty for open questions.
        answer_index: Place of the right candidate.
    """

    video: str
    text: str
    answers: tuple[str, ...]
    question_id: str
    kind: str = ""
    candidates: tuple[str, ...] = ()
    answer_index: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A query and the stretches of a video that it is true of, in seconds from the first frame.

    Attributes:
        video: Name of the video.
        query: What is looked for.
        query_id: As the file numbers it, or its place in the file.
        duration_s: Of the video; None if the file does not say.
        windows: (start, end) of each stretch.
        ratings: Number of a clip, and how well each of several people found that it fits; a clip that is not
            named has 0 of everyone. Empty if nobody was asked.
    """

    video: str
    query: str
    query_id: str
    duration_s: float | None
    windows: tuple[tuple[float, float], ...]
    ratings: tuple[tuple[int, tuple[float, ...]], ...] = ()

    @property
    def has_odd_window(self) -> bool:
        """Whether a window is empty, begins before the video or ends after it."""
        last = float("inf") if self.duration_s is None else self.duration_s
        return any(not 0 <= start < end <= last for start, end in self.windows)


Record: TypeAlias = Captioned | Question | Moment


def video_key(name: str) -> str:
    """Return a video's name as layouts agree on it: no extension of a video, no bare dot at the end.

    ``video9770.mp4`` and ``video9770`` are one video, and so are ``a@N03_1.`` and ``a@N03_1.mov``, while the
    dots inside ``1004_A_00.01.02.345-00.01.04.567`` stay. Of an absolute path only the last part counts.
    """
    path = PurePosixPath(name)
    text = path.name if path.is_absolute() else str(path)
    stem, dot, extension = text.rpartition(".")
    return stem if dot and stem and (not extension or extension.lower() in VIDEO_EXTENSIONS) else text


def merge_rows(rows: Iterable[Captioned]) -> list[Captioned]:
    """Join the rows of each single video in order of appearance; every caption stays, repeated ones too.

    Names must be equal to the letter: DiDeMo's test file describes 33 videos under two extensions each, and
    its lists keep the descriptions of one.
    """
    merged: dict[tuple[str, ...], list[str]] = {}
    several: list[Captioned] = []
    for row in rows:
        if len(row.videos) > 1:
            several.append(row)
        else:
            merged.setdefault(row.videos, []).extend(row.captions)
    single = [Captioned(videos=videos, captions=tuple(texts)) for videos, texts in merged.items()]
    return single + several


def content_hash(records: Sequence[Record]) -> str:
    """Return a hash that is equal for equal content, in whatever layout, order of videos or file it came."""
    lines = []
    for record in records:
        values = asdict(record)
        for name in ("video", "videos"):
            if name in values:
                keys = values[name] if name == "videos" else [values[name]]
                values[name] = sorted(map(video_key, keys))
        lines.append(json.dumps(values, sort_keys=True, ensure_ascii=False))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
