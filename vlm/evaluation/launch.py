"""From what a user names (model, protocol, files) to the objects that an evaluation needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vlm.data.decoding import open_video
from vlm.data.frame_sampling import middle_frames
from vlm.data.preprocessing import preprocess
from vlm.errors import InvalidInput, UsageError
from vlm.evaluation.benchmarks.reading import read_choice_set, read_retrieval_set
from vlm.evaluation.card import Card, read_card
from vlm.evaluation.card.leakage import read_overlap
from vlm.evaluation.dataset import EvaluationSet, refuse_missing
from vlm.evaluation.encoders.shards import ShardTask, run_in_processes
from vlm.evaluation.encoders.sources import is_features, open_encoder
from vlm.evaluation.protocol import Protocol, load_protocol, require_task
from vlm.evaluation.questions import QuestionSet, evaluate_choices
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.evaluation.scores.corrections import Corrections
from vlm.evaluation.world_manifest import read_world, read_world_questions
from vlm.types import Preprocessing, VideoTextEncoder


class Evaluated(NamedTuple):
    """A card, and the file of every clip of its gallery by name; none with a file of features."""

    card: Card
    paths: dict[str, Path]


def evaluate_source(
    source: str | VideoTextEncoder,
    protocol_name: str,
    annotations: Path,
    videos: Path | None,
    *,
    controls: Sequence[str] = (),
    overrides: tuple[str, ...] = (),
    device: str = "auto",
    options: RunOptions | None = None,
    processes: int = 1,
    corrections: Corrections | None = None,
    overlap: Path | None = None,
) -> Evaluated:
    """Evaluate a model, by its name or given, on files that are named.

    Args:
        source: What ``load_model`` takes, a file of features, or a model, see ``open_encoder``.
        protocol_name: A name of ``vlm eval list``.
        annotations: The protocol's annotation file, or the folder of all.
        videos: Folder of the clips; None with a file of features.
        controls: ``NAME=SOURCE`` or ``NAME=card.json`` of models trained with the same budget.
        overrides: ``key=value`` changes to the protocol; the card says what was measured.
        device: Where the models run.
        options: How to run.
        processes: How many encode videos at once, into the cache.
        corrections: Corrections of the embedding scores that are reported too.
        overlap: What `vlm data overlap` found of the gallery in the model's training set.

    Raises:
        InvalidInput: Protocol, annotations, videos, overlap or model cannot be used.
        UsageError: A control or an override is not written as it should be.
    """
    options = options or RunOptions()
    protocol = load_protocol(protocol_name, overrides)
    require_task(protocol, "retrieval")
    named = [_named_control(control) for control in controls]
    found = read_overlap(overlap) if overlap else None
    data = read_annotations(protocol, annotations, videos)
    if not is_features(source):
        _check_present(data, options.allow_missing)
    if processes > 1:
        task = _shard_task(source, protocol_name, annotations, videos, overrides, device, options)
        run_in_processes(task, processes)
    card = evaluate_model(
        open_encoder(source, protocol.frames, device),
        data,
        protocol,
        partial(load_clip, trim_s=protocol.trim_s),
        source=source if isinstance(source, str) else "",
        options=options,
        controls={name: _open_control(place, protocol, device) for name, place in named},
        corrections=corrections,
        overlap=found,
    )
    paths = {} if videos is None else dict(zip(data.clip_ids, data.paths, strict=True))
    return Evaluated(card, paths)


def ask_source(
    source: str,
    protocol_name: str,
    annotations: Path,
    videos: Path,
    *,
    overrides: tuple[str, ...] = (),
    device: str = "auto",
    allow_missing: bool | int = False,
    overlap: Path | None = None,
) -> Card:
    """Ask a model that is named rather than given every multiple-choice question; as ``evaluate_source``.

    Raises:
        InvalidInput: Protocol, annotations, videos or model cannot be used.
        UsageError: An override is not written as it should be.
    """
    protocol = load_protocol(protocol_name, overrides)
    if protocol.layout == "benchmark":
        require_task(protocol, "multiple-choice")
    _check_folder(videos)
    if protocol.layout == "world":
        data = read_world_questions(annotations, videos)
    else:
        data = read_choice_set(protocol, annotations, videos)
    _check_present(data, allow_missing)
    model = open_encoder(source, protocol.frames, device)
    load = partial(load_clip, trim_s=protocol.trim_s)
    found = read_overlap(overlap) if overlap else None
    return evaluate_choices(
        model, data, protocol, load, source=source, allow_missing=allow_missing, overlap=found
    )


def read_annotations(protocol: Protocol, annotations: Path, videos: Path | None) -> EvaluationSet:
    """Read the annotations in the layout that the protocol names; ``videos`` None if none will be opened.

    Raises:
        InvalidInput: A file or folder is missing, or the annotations are not in that layout.
    """
    if videos is not None:
        _check_folder(videos)
    if protocol.layout == "world":
        return read_world(annotations, videos or Path(), protocol)
    return read_retrieval_set(protocol, annotations, videos)


def load_clip(path: Path, preprocessing: Preprocessing, trim_s: float | None = None) -> Tensor:
    """Return a clip as the encoder takes it: the middle frames of equal spans, (t, 3, s, s) float32.

    Args:
        path: The video's file.
        preprocessing: The model's.
        trim_s: Only this many seconds from the start are seen: ``int(trim_s * fps)`` frames, as the reference
            counts them.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    with open_video(path) as video:
        seen = video.info.num_frames
        if trim_s is not None and video.info.duration_s > trim_s:
            seen = max(1, min(seen, int(trim_s * video.info.fps)))
        frames = video.read(middle_frames(seen, preprocessing.num_frames))
    return preprocess(frames, preprocessing)


def _shard_task(
    source: str | VideoTextEncoder,
    protocol: str,
    annotations: Path,
    videos: Path | None,
    overrides: tuple[str, ...],
    device: str,
    options: RunOptions,
) -> ShardTask:
    if options.cache is None or videos is None or not isinstance(source, str):
        raise UsageError("several processes encode into a cache, a model that is named: --cache DIR")
    return ShardTask(
        source=source,
        protocol=protocol,
        annotations=annotations,
        videos=videos,
        overrides=overrides,
        device=device,
        options=options,
    )


def _check_present(data: EvaluationSet | QuestionSet, allow_missing: bool | int) -> None:
    """Raise before hours are spent on the others if more videos are missing than are allowed.

    Raises:
        InvalidInput: They are.
    """
    pairs = zip(data.clip_ids, data.paths, strict=True)
    absent = [(clip, "missing") for clip, path in pairs if not path.is_file()]
    refuse_missing(absent, len(data.paths), allow_missing)


def _check_folder(videos: Path) -> None:
    if not videos.is_dir():
        raise InvalidInput(f"{videos}: no such folder of videos")


def _open_control(place: str, protocol: Protocol, device: str) -> VideoTextEncoder | Card:
    return read_card(Path(place)) if place.endswith(".json") else open_encoder(place, protocol.frames, device)


def _named_control(text: str) -> tuple[str, str]:
    name, separator, place = text.partition("=")
    if not separator or not name or not place:
        raise UsageError(f"--control: expected NAME=SOURCE or NAME=card.json, got {text!r}")
    return name, place
