"""What is measured, pinned in a file: which captions, which positives, which frames, which scores.

Two numbers may be compared only if their protocols are equal, field by field.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from numpy.typing import ArrayLike

from vlm.assets import asset
from vlm.config import load_config
from vlm.errors import InvalidInput
from vlm.evaluation.benchmarks.description import (
    Counts,
    FileNames,
    KnownFile,
    Origin,
    Published,
    ReferenceInput,
)
from vlm.evaluation.moments.settings import MomentSettings
from vlm.metrics import (
    Interval,
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_ratio,
)
from vlm.types import Preprocessing

_FOLDER = "eval/protocols"
_SUBFOLDERS = (".", "retrieval", "questions", "moments")
Task: TypeAlias = Literal["retrieval", "multiple-choice", "open-ended", "moments"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BootstrapSettings:
    """How the 95 % intervals are drawn; the unit is the video (a clip and its twin count as one)."""

    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples must be at least 100 for a 95 % interval, got {self.resamples}")

    def mean(self, values: ArrayLike, groups: ArrayLike, *, bounds: bool = True) -> Interval:
        """Return ``bootstrap_mean`` with these settings."""
        return bootstrap_mean(values, groups, resamples=self.resamples, seed=self.seed, bounds=bounds)

    def class_mean(self, values: ArrayLike, classes: ArrayLike, groups: ArrayLike) -> Interval:
        """Return ``bootstrap_class_mean`` with these settings."""
        return bootstrap_class_mean(values, classes, groups, resamples=self.resamples, seed=self.seed)

    def median(self, values: ArrayLike, groups: ArrayLike) -> Interval:
        """Return ``bootstrap_median`` with these settings."""
        return bootstrap_median(values, groups, resamples=self.resamples, seed=self.seed)

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike, groups: ArrayLike) -> Interval | None:
        """Return ``bootstrap_ratio`` with these settings."""
        return bootstrap_ratio(numerators, denominators, groups, resamples=self.resamples, seed=self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring.

    Attributes:
        name: What ``--protocol`` says; equals the file's name.
        version: Raised with every change of meaning; cards of unequal versions are not compared.
        summary: One line for ``vlm eval list``.
        task: What is asked of a model.
        layout: How the annotations are written: ``world`` is the manifest of ``vlm data world``,
            ``benchmark`` any layout of ``vlm.data.annotations.benchmarks``, told by the content.
        split: Which part of the data set, in words.
        part: Name of that part inside a file that holds several.
        captions: Queries of a clip: its ``first`` caption, ``all`` of them each by itself, or ``joined`` into
            one paragraph with spaces between.
        positives: Right clips of a query. ``strict``: those it was written for; ``same-text``: also those for
            which the same words were written, after cleaning; ``all-true``: every clip of a world of which it
            is true.
        recall_at: The k of R@k.
        rerank_k: How many candidates the matching head scores for each query; 0 = none.
        minimal_pairs: Also ask, of each clip of a world, about captions that differ in one thing.
        sampling: How frames are chosen from a clip; ``middle`` of equal spans.
        frames: How many; None leaves it to the model.
        trim_s: Only this many seconds from the start are seen; None = all.
        text_tokens: Where texts are cut, special tokens included, for models with BERT's tokenizer; None =
            where the model ends.
        input: How the models of the published numbers saw a frame.
        moments: Which windows count as found; of protocols for moments only.
        bootstrap: How intervals are drawn.
        expected: What the annotations must hold.
        files: What they are called.
        prefixes: What the name of a video's file may begin with beyond what the annotations say.
        numbered: How a video is called of which the annotations say only a number.
        known: Files in circulation whose content was read.
        origin: Where annotations and videos come from.
        published: What others reached.
        freeze: What a generated world must be; read by its own tests, not a setting.
    """

    name: str
    version: int
    summary: str
    task: Task = "retrieval"
    layout: Literal["world", "benchmark"] = "benchmark"
    split: str = ""
    part: str | None = None
    captions: Literal["first", "all", "joined"] = "first"
    positives: Literal["all-true", "strict", "same-text"] = "strict"
    recall_at: tuple[int, ...] = (1, 5, 10, 50)
    rerank_k: int = 0
    minimal_pairs: bool = False
    sampling: Literal["middle"] = "middle"
    frames: int | None = None
    trim_s: float | None = None
    text_tokens: int | None = None
    input: ReferenceInput | None = None
    moments: MomentSettings | None = None
    bootstrap: BootstrapSettings = field(default_factory=BootstrapSettings)
    expected: Counts | None = None
    files: FileNames = field(default_factory=FileNames)
    prefixes: tuple[str, ...] = ()
    numbered: str = "video{}"
    known: tuple[KnownFile, ...] = ()
    origin: Origin | None = None
    published: tuple[Published, ...] = ()
    freeze: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.recall_at or min(self.recall_at) < 1 or self.rerank_k < 0:
            raise ValueError(
                f"recall_at must be positive numbers and rerank_k at least 0, "
                f"got {self.recall_at} and {self.rerank_k}"
            )
        if (self.frames is not None and self.frames < 1) or (self.trim_s is not None and self.trim_s <= 0):
            raise ValueError(f"frames and trim_s must be positive, got {self.frames} and {self.trim_s}")
        if self.minimal_pairs and self.layout != "world":
            raise ValueError("minimal pairs are made of scenes, so only a world has them")
        if (self.task == "moments") != (self.moments is not None):
            raise ValueError(f"moments goes with the task 'moments' and with no other, got {self.task!r}")
        if self.moments is not None and max(self.recall_at) > self.moments.max_windows:
            raise ValueError(
                f"max_windows must be at least the largest of recall_at, got {self.moments.max_windows} and "
                f"{self.recall_at}"
            )
        if self.text_tokens is not None and self.text_tokens < 3:
            raise ValueError(f"text_tokens must be at least 3, got {self.text_tokens}")
        if (self.positives == "all-true") != (self.layout == "world") and self.positives != "strict":
            raise ValueError(
                f"positives {self.positives!r} does not go with the layout {self.layout!r}: a world knows "
                "'all-true', a benchmark 'same-text', and both 'strict'"
            )

    def deviations(self, preprocessing: Preprocessing) -> list[str]:
        """Return in which settings a model's input differs from that of the published numbers, in words."""
        found = [] if self.input is None else self.input.deviations(preprocessing)
        return [*self.frame_deviations(preprocessing.num_frames), *found]

    def frame_deviations(self, num_frames: int) -> list[str]:
        """Return ``frames: 4 instead of 8`` if a model takes another number than is pinned."""
        if self.frames in (None, num_frames):
            return []
        return [f"frames: {num_frames} instead of {self.frames}"]

    @property
    def num_trials(self) -> int | None:
        """How many trials a published share is of; None if the protocol does not say.

        Of several queries of one video only one counts, since they succeed and fail together.
        """
        if self.expected is None:
            return None
        expected = self.expected
        counts = (expected.queries or expected.questions or expected.moments, expected.videos)
        return min((count for count in counts if count), default=None)


def load_protocol(name: str, overrides: tuple[str, ...] = ()) -> Protocol:
    """Read a protocol by the name that ``vlm eval list`` shows.

    Raises:
        InvalidInput: There is no such protocol, or its file is not valid.
        UsageError: An override is not valid.
    """
    known = protocol_files()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        raise InvalidInput(f"no protocol {name!r}; {hint} (see: vlm eval list)")
    protocol = load_config(Protocol, known[name], overrides)
    if protocol.name != name:
        raise InvalidInput(
            f"{known[name]}: name is {protocol.name!r}, expected {name!r} as the file is called"
        )
    return protocol


def protocol_files() -> dict[str, Path]:
    """Return name → file of every shipped protocol, sorted by name."""
    root = asset(_FOLDER)
    found = {path.stem: path for folder in _SUBFOLDERS for path in root.joinpath(folder).glob("*.yaml")}
    return dict(sorted(found.items()))


def require_task(protocol: Protocol, *tasks: Task) -> None:
    """Raise unless a protocol is for one of these tasks.

    Raises:
        InvalidInput: It is for another.
    """
    if protocol.task not in tasks:
        raise InvalidInput(
            f"protocol {protocol.name!r} measures {protocol.task}, which this program does not "
            f"({' and '.join(tasks)} are what it does)"
        )
