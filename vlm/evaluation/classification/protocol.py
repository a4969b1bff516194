"""How a classifier is tested, pinned in a file: which views of which videos, and which measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.assets import asset
from vlm.config import load_config
from vlm.data.annotations.labels import LabelLayout
from vlm.errors import InvalidInput
from vlm.evaluation.benchmarks.description import (
    Counts,
    KnownFile,
    Origin,
    Published,
    ReferenceInput,
)
from vlm.evaluation.protocol import BootstrapSettings

_FOLDER = "eval/protocols/classification"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """How a linear classifier is trained on the features of a model that stays as it is.

    Attributes:
        penalties: Weights of the squared norm to choose among; see ``probe.fit_probe``.
        held_out: Share of the training videos that the choice is made on, and never on those of the test.
        seed: Of drawing these.
        part: Part of the labels to train with, where a file holds several.
    """

    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    held_out: float = 0.2
    seed: int = 0
    part: str | None = None

    def __post_init__(self) -> None:
        if not self.penalties or min(self.penalties) <= 0 or not 0 < self.held_out < 1:
            raise ValueError(
                f"penalties must be positive and held_out between 0 and 1, got {self.penalties} and "
                f"{self.held_out}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationProtocol:
    """One way of testing; two cards may be compared only if theirs are equal, field by field.

    Attributes:
        name: What ``--protocol`` says; equals the file's name.
        version: Raised with every change of meaning.
        summary: One line for ``vlm eval list``.
        split: Which part of the data set, in words.
        layout: How the labels are written, see ``vlm.data.annotations.labels``; ``world`` is the manifest of
            ``vlm data world``.
        part: Part of the labels that is meant, where a file holds several.
        label: What is a class in the world: ``direction`` or ``action``.
        clips: Views of a video in time.
        crops: Views in space: squares that lie evenly along the long side, the short side being resized to
            the model's input; one lies in the middle.
        sampling: Frames of a view: ``segments``: one of each equal span, at (view + 1) / (clips + 1) of it;
            ``shifted``: the same at view / clips; ``middle``: as in training, for one clip; ``dense``: every
            ``stride``-th of one stretch.
        stride: Frames between two, if ``dense``.
        top: The k of top-k accuracy; those that exceed the number of classes are left out.
        prompts: Texts with ``{}`` for the name of a class, by which a model with a text side tells classes
            apart without training.
        probe: How a linear classifier on frozen features is trained.
        input: How the models of the published numbers saw a frame; the number of frames is each model's own.
        bootstrap: How intervals are drawn.
        expected: What the labels must hold.
        known: Files in circulation whose content was read.
        origin: Where labels and videos come from.
        published: What others reached.
    """

    name: str
    version: int
    summary: str
    split: str = ""
    layout: LabelLayout | Literal["world"] = "auto"
    part: str | None = None
    label: Literal["direction", "action"] = "direction"
    clips: int = 1
    crops: int = 1
    sampling: Literal["segments", "shifted", "middle", "dense"] = "segments"
    stride: int = 4
    top: tuple[int, ...] = (1, 5)
    prompts: tuple[str, ...] = ()
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    input: ReferenceInput | None = None
    bootstrap: BootstrapSettings = field(default_factory=BootstrapSettings)
    expected: Counts | None = None
    known: tuple[KnownFile, ...] = ()
    origin: Origin | None = None
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        if min(self.clips, self.crops, self.stride, *self.top) < 1 or 1 not in self.top:
            raise ValueError("clips, crops, stride and top must be at least 1, and 1 among top")
        if wrong := [prompt for prompt in self.prompts if prompt.count("{}") != 1]:
            raise ValueError(f"a prompt holds {{}} once, for the name of the class, got {wrong[0]!r}")
        if self.sampling == "middle" and self.clips > 1:
            raise ValueError(f"sampling 'middle' gives one clip, got clips {self.clips}; use 'segments'")

    @property
    def num_trials(self) -> int | None:
        """How many videos a published share is of; None if the protocol does not say."""
        return None if self.expected is None else self.expected.videos


def load_classification_protocol(name: str, overrides: tuple[str, ...] = ()) -> ClassificationProtocol:
    """Read a protocol by the name that ``vlm eval list`` shows.

    Raises:
        InvalidInput: There is no such protocol, or its file is not valid.
        UsageError: An override is not valid.
    """
    known = classification_protocol_files()
    if name not in known:
        raise InvalidInput(
            f"no protocol {name!r} for classification; expected one of {', '.join(known)} "
            "(see: vlm eval list)"
        )
    protocol = load_config(ClassificationProtocol, known[name], overrides)
    if protocol.name != name:
        raise InvalidInput(
            f"{known[name]}: name is {protocol.name!r}, expected {name!r} as the file is called"
        )
    return protocol


def classification_protocol_files() -> dict[str, Path]:
    """Return name → file of every shipped protocol, sorted by name."""
    return {path.stem: path for path in sorted(asset(_FOLDER).glob("*.yaml"))}
