"""Whether labels are those that a classification protocol means, and which of their videos are there."""

from __future__ import annotations

from pathlib import Path

from vlm.data.annotations.labels import LabelledSet, read_labelled
from vlm.errors import DataError, InvalidInput
from vlm.evaluation.benchmarks.checking import CheckReport, known_state, undecodable
from vlm.evaluation.benchmarks.description import Counts
from vlm.evaluation.card import file_sha256
from vlm.evaluation.classification.protocol import ClassificationProtocol


def require_class_counts(protocol: ClassificationProtocol, data: LabelledSet, annotations: Path) -> None:
    """Raise unless the labels hold what the protocol expects.

    Raises:
        InvalidInput: They do not; every difference is named.
    """
    if differences := _differences(protocol, data):
        raise InvalidInput(
            f"{annotations}: not {protocol.name} ({protocol.split}): {'; '.join(differences)}; nothing was "
            "measured (--set expected=null measures what is there, and its card compares with no full one)"
        )


def check_classes(
    protocol: ClassificationProtocol, annotations: Path, videos: Path | None, *, decode: bool = False
) -> CheckReport:
    """Compare labels that are at hand, and their videos, with what a protocol needs.

    Args:
        protocol: Not of a world.
        annotations: The labels.
        videos: Folder of the videos; None looks for none.
        decode: Open every video and decode its first frame.

    Raises:
        InvalidInput: The folder of videos does not exist.
    """
    if videos is not None and not videos.is_dir():
        raise InvalidInput(f"{videos}: no such folder of videos")
    report = CheckReport(protocol.name)
    try:
        assert protocol.layout != "world", "a world is made here, not checked"
        data = read_labelled(annotations, videos or Path(), layout=protocol.layout, part=protocol.part)
    except DataError as error:
        report.problems.append(str(error))
        return report
    if annotations.is_file():
        digest = file_sha256(annotations)
        report.files.append(
            {"name": annotations.name, "sha256": digest, "state": known_state(protocol.known, digest)}
        )
    report.problems += _differences(protocol, data)
    report.num_videos = len(data.names)
    report.facts.append(f"{len(data.names)} videos of {len(set(data.labels))} classes")
    if videos is not None:
        pairs = zip(data.names, data.reasons, strict=True)
        report.missing += [(name, reason) for name, reason in pairs if reason]
    for name, path in zip(data.names, data.paths, strict=True) if decode else ():
        if path is not None and (reason := undecodable(path)):
            report.undecodable.append((name, reason))
    return report


def _differences(protocol: ClassificationProtocol, data: LabelledSet) -> list[str]:
    if protocol.expected is None:
        return []
    return protocol.expected.differences(Counts(videos=len(data.names), classes=len(set(data.labels))))
