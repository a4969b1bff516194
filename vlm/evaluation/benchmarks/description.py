"""What a protocol says of the world outside: files, counts, terms, and what others published."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from vlm.types import Preprocessing

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a split holds; a count that is None is not checked.

    Attributes:
        videos: Different videos.
        captions: Captions or sentences as the file has them.
        queries: Queries after the caption rule.
        questions: Questions.
        moments: Queries with windows.
        classes: Different classes that occur.
    """

    videos: int | None = None
    captions: int | None = None
    queries: int | None = None
    questions: int | None = None
    moments: int | None = None
    classes: int | None = None

    def named(self) -> dict[str, int]:
        """Return name → count of those that are not None."""
        return {
            field.name: count for field in fields(self) if (count := getattr(self, field.name)) is not None
        }

    def differences(self, found: Counts) -> list[str]:
        """Return ``videos: expected 1000, found 999`` for each count that is expected and differs."""
        return [
            f"{name}: expected {wanted}, found {getattr(found, name)}"
            for name, wanted in self.named().items()
            if wanted != getattr(found, name)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileNames:
    """What the files are called in circulation; the first that is there is taken.

    Attributes:
        main: Captions, questions or queries.
        lists: Videos of the split, for a main file that holds more.
        answers: Answers, where they stand apart from the questions.
        answer_list: Answers to choose from.
        mapping: From numbers of videos to their names.
    """

    main: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    answer_list: tuple[str, ...] = ()
    mapping: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownFile:
    """A file in circulation whose content was read: counts of this protocol were confirmed on it."""

    name: str
    sha256: str
    source: str

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 must be 64 lower-case hexadecimal digits, got {self.sha256!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where annotations and videos come from, under which terms, and what is known to go wrong."""

    annotations: str
    videos: str
    terms: str
    notes: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceInput:
    """How the published numbers' models saw a frame.

    A model under test keeps its own preprocessing, which is a part of it; the card says where it differs.
    """

    image_size: int = 224
    resize: str = "bicubic"
    antialias: bool = False
    keep_aspect: bool = False

    def deviations(self, preprocessing: Preprocessing) -> list[str]:
        """Return ``image_size: 384 instead of 224`` for each setting in which a model differs."""
        return [
            f"{field.name}: {own} instead of {wanted}"
            for field in fields(self)
            if (wanted := getattr(self, field.name)) != (own := getattr(preprocessing, field.name))
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A result as its authors published it; nobody has run their files here.

    Attributes:
        model: Name of the model, with its training data where that tells two apart.
        score: ``itc``, ``itm@k`` and the like.
        source: Where it was published.
        frames: Frames that the authors used.
        finetuned: Whether the model was trained on this data set.
        text_to_video: Recall at 1, 5 and 10, or the first of these, in percent.
        video_to_text: The same the other way round.
        accuracy: Of answers, in percent.
    """

    model: str
    score: str
    source: str
    frames: int | None = None
    finetuned: bool = False
    text_to_video: tuple[float, ...] = ()
    video_to_text: tuple[float, ...] = ()
    accuracy: float | None = None

    def __post_init__(self) -> None:
        values = self.measures().values()
        if not values or not all(0 <= value <= 100 for value in values):
            raise ValueError(f"a published result needs percentages, got {self.measures()}")

    def measures(self) -> dict[str, float]:
        """Return name of each measure → percent."""
        found = {} if self.accuracy is None else {"accuracy": self.accuracy}
        for title, values in (("text to video", self.text_to_video), ("video to text", self.video_to_text)):
            found |= {f"{title} R@{k}": value for k, value in zip((1, 5, 10), values, strict=False)}
        return found


def share_interval(percent: float, num_trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``num_trials`` by the normal approximation, in percent.

    >>> [round(bound, 1) for bound in share_interval(35.6, 1000)]
    [32.6, 38.6]
    """
    share = percent / 100
    reach = 1.96 * math.sqrt(share * (1 - share) / num_trials)
    return 100 * max(0.0, share - reach), 100 * min(1.0, share + reach)


def describe_published(published: Published, num_trials: int | None) -> str:
    """Return one line: model, score, and each measure, with its interval if the number of trials is known."""
    parts = []
    for name, value in published.measures().items():
        text = f"{name} {value:g}"
        if num_trials:
            low, high = share_interval(value, num_trials)
            text += f" [{low:.1f}, {high:.1f}]"
        parts.append(text)
    where = f", {published.frames} frames" if published.frames else ""
    tuned = ", fine-tuned" if published.finetuned else ""
    return (
        f"{published.model} ({published.score}{where}{tuned}): {'; '.join(parts)}; as published in "
        f"{published.source}, not measured by this project"
    )
