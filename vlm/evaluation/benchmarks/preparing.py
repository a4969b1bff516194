"""Annotations of a benchmark in our own layout, and the command that measures with them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from vlm.data.annotations.benchmarks import to_json
from vlm.evaluation.benchmarks.description import (
    Counts,
    KnownFile,
    Origin,
    ReferenceInput,
    describe_published,
)
from vlm.evaluation.benchmarks.reading import read_records, require_counts
from vlm.evaluation.classification.protocol import ClassificationProtocol
from vlm.evaluation.protocol import Protocol
from vlm.retrieval.durability import write_bytes_durably

_PROGRAMS = {"retrieval": "retrieval", "multiple-choice": "qa", "open-ended": "qa", "moments": "moments"}


def prepare_benchmark(protocol: Protocol, annotations: Path, out: Path) -> None:
    """Write a protocol's annotations as one file in our own layout, after its counts were compared.

    Args:
        protocol: With the layout ``benchmark``.
        annotations: The main file or the folder of all.
        out: The file to write; an older one stays until the new one is whole.

    Raises:
        InvalidInput: The annotations cannot be used, or do not hold what the protocol expects.
        NoSpaceError: The disk is full.
    """
    found = read_records(protocol, annotations)
    require_counts(protocol, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_durably(out, to_json(found.records, protocol.name, found.files).encode())


def measuring_command(
    protocol: Protocol, annotations: Path, videos: str = "DIR", model: str = "SOURCE"
) -> str:
    """Return the command that measures a model, or free answers in a file, with prepared annotations."""
    words = ["vlm", "eval", _PROGRAMS[protocol.task], "--protocol", protocol.name]
    words += ["--annotations", str(annotations)]
    if protocol.task == "open-ended":
        words += ["--predictions", "ANSWERS.jsonl"]
    else:
        words += ["--videos", videos, "--model", model]
    return shlex.join((*words, "--out", f"{protocol.name}.json"))


def describe_classes(protocol: ClassificationProtocol) -> list[str]:
    """Return lines on the files of a classification protocol, their terms, and on published numbers."""
    lines = [f"{protocol.name} v{protocol.version}: {protocol.summary}"]
    if protocol.split:
        lines.append(f"split: {protocol.split}")
    lines += describe_counts(protocol.expected)
    lines.append(
        f"rules: {protocol.clips} clips x {protocol.crops} crops, {protocol.sampling} sampling, as many "
        "frames as the model takes" + describe_input(protocol.input)
    )
    if protocol.origin is not None:
        lines += describe_origin(protocol.origin)
    lines += describe_known(protocol.known)
    return lines + [
        f"published: {describe_published(entry, protocol.num_trials)}" for entry in protocol.published
    ]


def describe_counts(expected: Counts | None) -> list[str]:
    """Return a line with the counts that are pinned; none if there are none."""
    if expected is None:
        return []
    return ["expected: " + ", ".join(f"{value:,} {name}" for name, value in expected.named().items())]


def describe_input(wanted: ReferenceInput | None) -> str:
    """Return how the published models saw a frame, to be appended to a list; empty if that is not pinned."""
    if wanted is None:
        return ""
    antialias = "antialiased" if wanted.antialias else "without antialiasing"
    shape = "centre crop" if wanted.keep_aspect else "squeezed"
    return f", {wanted.image_size} pixels, {wanted.resize} {antialias}, {shape}"


def describe_known(known: Sequence[KnownFile]) -> list[str]:
    """Return a line for every file whose hash is known."""
    return [f"known file: {entry.name} sha256 {entry.sha256} ({entry.source})" for entry in known]


def describe_origin(origin: Origin) -> list[str]:
    """Return lines on where files come from."""
    parts = (("annotations", origin.annotations), ("videos", origin.videos), ("terms", origin.terms))
    return [f"{name}: {text}" for name, text in (*parts, ("note", origin.notes)) if text]


def describe_protocol(protocol: Protocol) -> list[str]:
    """Return lines on the files of a protocol, their terms and hashes, and on published numbers."""
    lines = [f"{protocol.name} v{protocol.version}: {protocol.summary}"]
    if protocol.split:
        lines.append(f"split: {protocol.split}")
    lines += describe_counts(protocol.expected)
    rules = [
        f"captions {protocol.captions}",
        f"positives {protocol.positives}",
        f"{protocol.sampling} sampling",
    ]
    if protocol.frames:
        rules.append(f"{protocol.frames} frames")
    rules.append(f"first {protocol.trim_s:g} s" if protocol.trim_s else "not trimmed")
    if protocol.text_tokens:
        rules.append(f"{protocol.text_tokens} tokens of text")
    lines.append("rules: " + ", ".join(rules) + describe_input(protocol.input))
    if protocol.origin is not None:
        lines += describe_origin(protocol.origin)
    if protocol.files.main:
        lines.append("looked for in a folder: " + ", ".join((*protocol.files.main, *protocol.files.lists)))
    lines += describe_known(protocol.known)
    lines += [f"published: {describe_published(entry, protocol.num_trials)}" for entry in protocol.published]
    return lines
