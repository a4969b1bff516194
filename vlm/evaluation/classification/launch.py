"""From what a user names (model, protocol, labels, videos) to a card of a classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from vlm.data.annotations.labels import read_classes, read_labelled
from vlm.errors import InvalidInput
from vlm.evaluation.card import Card, file_sha256
from vlm.evaluation.card.leakage import read_overlap
from vlm.evaluation.classification.checking import require_class_counts
from vlm.evaluation.classification.frozen import evaluate_linear_probe, evaluate_zero_shot
from vlm.evaluation.classification.protocol import ClassificationProtocol, load_classification_protocol
from vlm.evaluation.classification.runner import ScoringOptions, VideoClasses, evaluate_classifier
from vlm.evaluation.classification.views import load_views
from vlm.evaluation.world_manifest import read_world_labels
from vlm.models import load_model
from vlm.models.classifier import Classifier

Method: TypeAlias = Literal["classifier", "linear-probe", "zero-shot"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFiles:
    """What a linear probe is trained on: labels in the protocol's layout, and the folder of the videos."""

    annotations: Path
    videos: Path


def classify_source(
    source: str,
    protocol_name: str,
    annotations: Path,
    videos: Path,
    *,
    method: Method = "classifier",
    train: TrainingFiles | None = None,
    classes: Path | None = None,
    overrides: tuple[str, ...] = (),
    device: str = "auto",
    options: ScoringOptions | None = None,
    overlap: Path | None = None,
) -> Card:
    """Test a model that is named rather than given.

    Args:
        source: What ``load_model`` takes.
        protocol_name: A name of ``vlm eval list``.
        annotations: The labels, in the protocol's layout.
        videos: Folder of the videos.
        method: ``classifier``: the model's own head; ``linear-probe``: one that is trained here on its frozen
            features; ``zero-shot``: prompts with the names of the classes.
        train: What the probe is trained on.
        classes: File with the names of the classes; None takes those that the model or the labels know.
        overrides: ``key=value`` changes to the protocol; the card says what was measured.
        device: Where the model runs.
        options: How to run.
        overlap: What `vlm data overlap` found of the tested videos in the model's training set.

    Raises:
        CapabilityError: The model is no classifier, or, for prompts, has no text side.
        InvalidInput: Protocol, labels, videos or model cannot be used.
        UsageError: An override is not written as it should be.
    """
    protocol = load_classification_protocol(protocol_name, overrides)
    for folder in (videos, *([train.videos] if train else [])):
        if not folder.is_dir():
            raise InvalidInput(f"{folder}: no such folder of videos")

    def tested(names: tuple[str, ...] | None) -> VideoClasses:
        found = read_test_set(protocol, annotations, videos, names)
        require_class_counts(protocol, found.data, annotations)
        return replace(found, overlap=read_overlap(overlap) if overlap else None)

    model = load_model(source, device=device)
    named = None if classes is None else read_classes(classes)
    if method == "linear-probe":
        assert train is not None, "a probe is trained on something"
        learnt = replace(protocol, part=protocol.probe.part)
        seen = read_test_set(learnt, train.annotations, train.videos, named)
        test = tested(seen.data.classes)
        return evaluate_linear_probe(model, seen, test, protocol, load_views, source=source, options=options)
    if method == "zero-shot":
        return evaluate_zero_shot(model, tested(named), protocol, load_views, source=source, options=options)
    model.require("classify")
    assert isinstance(model, Classifier), "no other kind can classify"
    names = model.config.class_names if named is None else named
    test = tested(names or None)
    return evaluate_classifier(model, test, protocol, load_views, source=source, options=options)


def read_test_set(
    protocol: ClassificationProtocol, annotations: Path, videos: Path, classes: tuple[str, ...] | None
) -> VideoClasses:
    """Read labels in the layout that a protocol names.

    Raises:
        InvalidInput: They are missing, or not in that layout.
    """
    if protocol.layout == "world":
        data, groups = read_world_labels(annotations, videos, protocol.label)
        return VideoClasses(data=data, groups=groups, annotations_sha256=file_sha256(annotations))
    data = read_labelled(annotations, videos, layout=protocol.layout, part=protocol.part, classes=classes)
    digest = "" if annotations.is_dir() else file_sha256(annotations)
    return VideoClasses(data=data, groups=tuple(range(len(data.names))), annotations_sha256=digest)
