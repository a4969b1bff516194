"""Captions without markup and without doubles, videos without copies; every change is counted."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.data.annotations import Annotation, locate_videos
from vlm.data.curation.fingerprints import Fingerprint, fingerprint, near_videos
from vlm.data.decoding import DecodeLimits
from vlm.data.shards.layout import Rejection
from vlm.errors import DataError

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_LINK = re.compile(r"\b(?:https?://|www\.)\S+|\b[\w.+-]+@[\w-]+\.[\w.]+\b", re.IGNORECASE)
_REPEATED = re.compile(r"\b(\w+)(?:\W+\1\b){3,}", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class CleaningRules:
    """Which captions stay.

    Attributes:
        min_words: Shorter ones go.
        max_words: Longer ones go.
        max_videos: A text that stands at more videos than this goes: it describes none of them.
    """

    min_words: int = 2
    max_words: int = 200
    max_videos: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words or self.max_videos < 1:
            raise ValueError("expected 1 <= min_words <= max_words and max_videos >= 1")


@dataclass(slots=True)
class Cleaning:
    """What cleaning did.

    Attributes:
        num_videos: Before and after.
        num_captions: Before and after; doubles count before.
        num_changed: Captions that stay, but not as they were.
        captions: Reason → captions that went.
        rejected: Videos that went, with the reason.
    """

    num_videos: tuple[int, int] = (0, 0)
    num_captions: tuple[int, int] = (0, 0)
    num_changed: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    rejected: list[Rejection] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the counts and the rejected videos, ready for JSON."""
        return {
            "num_videos": dict(zip(("before", "after"), self.num_videos, strict=True)),
            "num_captions": dict(zip(("before", "after"), self.num_captions, strict=True)),
            "num_captions_changed": self.num_changed,
            "captions_dropped_by_reason": dict(self.captions.most_common()),
            "videos_dropped_by_reason": dict(Counter(item.reason for item in self.rejected).most_common()),
            "videos_dropped": [[item.item, item.reason, item.detail] for item in self.rejected],
        }


def clean_captions(
    rows: Iterable[Annotation], rules: CleaningRules | None = None
) -> tuple[list[Annotation], Cleaning]:
    """Return one entry a video with its cleaned captions, and what was done.

    Reasons for captions that go: ``empty``, ``no_letters``, ``too_short``, ``too_long``, ``repetitive`` (a
    word four times in a row), ``double`` (said of the video before, but for case and punctuation),
    ``everywhere``. A video left without a caption goes too (``no_caption``).
    """
    rules = rules or CleaningRules()
    rows = list(rows)
    report = Cleaning()
    texts: dict[str, dict[str, str]] = {}  # video → comparable text → text
    metadata: dict[str, dict[str, Any]] = {}
    originals: set[str] = set()
    for row in rows:
        known = texts.setdefault(row.video, {})
        metadata[row.video] = {**row.metadata, **metadata.get(row.video, {})}
        for caption in row.captions:
            text = clean_text(caption)
            originals.add(caption)
            reason = caption_fault(text, rules)
            comparable = " ".join(re.findall(r"\w+", text.casefold()))
            if reason is None and comparable in known:
                reason = "double"
            if reason is None:
                known[comparable] = text
            else:
                report.captions[reason] += 1
    videos_of = Counter(comparable for known in texts.values() for comparable in known)
    kept: list[Annotation] = []
    for video, known in texts.items():
        captions = tuple(text for key, text in known.items() if videos_of[key] <= rules.max_videos)
        report.captions["everywhere"] += len(known) - len(captions)
        report.num_changed += sum(text not in originals for text in captions)
        if captions:
            kept.append(Annotation(video=video, captions=captions, metadata=metadata[video]))
        else:
            report.rejected.append(Rejection(video, "no_caption", "no caption is left"))
    report.captions = +report.captions
    report.num_videos = (len(texts), len(kept))
    before = sum(len(row.captions) for row in rows)
    report.num_captions = (before, sum(len(entry.captions) for entry in kept))
    return kept, report


def drop_copies(
    entries: Sequence[Annotation],
    folder: Path,
    report: Cleaning,
    *,
    max_distance: float = 0.3,
    on_video: Callable[[], object] = lambda: None,
) -> list[Annotation]:
    """Return the entries without videos that look like an earlier one, or that cannot be read.

    Adds to the report: ``near_duplicate`` with the video that stays, or the reason why it cannot be read.
    """
    prints: list[Fingerprint] = []
    readable: list[Annotation] = []
    for located in locate_videos(entries, folder):
        name = located.annotation.video
        try:
            if located.path is None:
                raise DataError("no such video file", located.reason)
            prints.append(fingerprint(located.path, DecodeLimits(max_seconds=120.0)))
            readable.append(located.annotation)
        except DataError as error:
            report.rejected.append(Rejection(name, error.reason, str(error)))
        on_video()
    dropped: dict[int, tuple[int, float]] = {}
    for first, second, distance in near_videos(prints, max_distance=max_distance):
        if first not in dropped:  # else its own original says whether the second is a copy
            dropped.setdefault(second, (first, distance))
    for number, (first, distance) in sorted(dropped.items()):
        detail = f"looks like {readable[first].video}, distance {distance:.3f}"
        report.rejected.append(Rejection(readable[number].video, "near_duplicate", detail))
    kept = [entry for number, entry in enumerate(readable) if number not in dropped]
    report.num_videos = (report.num_videos[0], len(kept))
    report.num_captions = (report.num_captions[0], sum(len(entry.captions) for entry in kept))
    return kept


def clean_text(caption: str) -> str:
    """Return the caption in one line: composed Unicode, no tags, entities, links, addresses or controls."""
    text = unicodedata.normalize("NFC", html.unescape(caption))
    text = _LINK.sub(" ", _TAG.sub(" ", text))
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") else char for char in text)
    return " ".join(text.split())


def caption_fault(text: str, rules: CleaningRules) -> str | None:
    """Return why a cleaned caption cannot stay, None if it can."""
    num_words = len(text.split())
    if not text:
        return "empty"
    if not any(char.isalpha() for char in text):
        return "no_letters"
    # scripts without blanks: a text of many letters is not short
    if num_words < rules.min_words and (text.isascii() or len(text) < 2 * rules.min_words):
        return "too_short"
    if num_words > rules.max_words:
        return "too_long"
    return "repetitive" if _REPEATED.search(text) else None
