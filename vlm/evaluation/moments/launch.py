"""From what a user names (protocol, annotations, model or predictions) to a card on moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlm.data.decoding import open_video, probe
from vlm.data.preprocessing import preprocess
from vlm.errors import DataError, InvalidInput
from vlm.evaluation.card import Card, file_sha256
from vlm.evaluation.card.leakage import read_overlap
from vlm.evaluation.dataset import refuse_missing
from vlm.evaluation.encoders.sources import is_features, open_encoder
from vlm.evaluation.moments.data import MomentSet, read_moment_set
from vlm.evaluation.moments.predictions import read_predictions, write_predictions
from vlm.evaluation.moments.proposals import cut_stretches
from vlm.evaluation.moments.runner import evaluate_found, evaluate_search, find_moments
from vlm.evaluation.moments.settings import Proposals
from vlm.evaluation.protocol import load_protocol, require_task
from vlm.types import Preprocessing, VideoTextEncoder


def search_moments(
    source: str | VideoTextEncoder,
    protocol_name: str,
    annotations: Path,
    videos: Path,
    *,
    overrides: tuple[str, ...] = (),
    device: str = "auto",
    batch_size: int = 16,
    allow_missing: bool | int = False,
    save: Path | None = None,
    overlap: Path | None = None,
) -> Card:
    """Let a model, by its name or given, find the moments of a protocol, and measure them.

    Args:
        source: What ``load_model`` takes, or a model.
        protocol_name: A name of ``vlm eval list``.
        annotations: The protocol's annotation file, or the folder of all.
        videos: Folder of the videos.
        overrides: ``key=value`` changes to the protocol; the card says what was measured.
        device: Where the model runs.
        batch_size: Stretches encoded at once.
        allow_missing: Leave unreadable videos out, and list them; a number allows so many.
        save: Where to write what was found, in the form that ``measure_predictions`` takes.
        overlap: What `vlm data overlap` found of the videos in the model's training set.

    Raises:
        InvalidInput: Protocol, annotations, videos or model cannot be used.
        UsageError: An override is not written as it should be.
    """
    protocol = load_protocol(protocol_name, overrides)
    require_task(protocol, "moments")
    if is_features(source):
        raise InvalidInput(
            f"{source}: stored features are of whole videos, and moments need stretches; give a model, or "
            "--predictions with what it found"
        )
    if not videos.is_dir():
        raise InvalidInput(f"{videos}: no such folder of videos")
    data = read_moment_set(protocol, annotations, videos)
    pairs = zip(data.video_ids, data.paths, strict=True)
    absent = [(name, "missing") for name, path in pairs if not path.is_file()]
    refuse_missing(absent, len(data.paths), allow_missing, "videos")  # before hours are spent on the others
    model = open_encoder(source, protocol.frames, device)
    search = find_moments(
        model, data, protocol, load_stretches, batch_size=batch_size, allow_missing=allow_missing
    )
    if save is not None:
        write_predictions(search.found, search.data, save)
    looked = read_overlap(overlap) if overlap else None
    return evaluate_search(search, model, protocol, source if isinstance(source, str) else "", looked)


def measure_predictions(
    predictions: Path,
    protocol_name: str,
    annotations: Path,
    videos: Path | None = None,
    *,
    overrides: tuple[str, ...] = (),
) -> Card:
    """Measure moments that stand in a file.

    Args:
        predictions: What was found; see ``read_predictions``.
        protocol_name: A name of ``vlm eval list``.
        annotations: The protocol's annotation file, or the folder of all.
        videos: Folder of the videos, to know their lengths where the annotations do not say.
        overrides: ``key=value`` changes to the protocol; the card says what was measured.

    Raises:
        InvalidInput: A file cannot be used, or the predictions are not those to the queries.
        UsageError: An override is not written as it should be.
    """
    protocol = load_protocol(protocol_name, overrides)
    require_task(protocol, "moments")
    if videos is not None and not videos.is_dir():
        raise InvalidInput(f"{videos}: no such folder of videos")
    data = read_moment_set(protocol, annotations, videos)
    found = read_predictions(predictions, data)
    if videos is not None:
        data = _with_lengths(data)
    model = {"name": predictions.name, "predictions_sha256": file_sha256(predictions)}
    return evaluate_found(found, data, protocol, model)


def load_stretches(
    path: Path, preprocessing: Preprocessing, proposals: Proposals
) -> Iterator[tuple[tuple[float, float], Tensor]]:
    """Yield every stretch of a video in seconds, by start, with its frames, (t, 3, s, s) float32.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    with open_video(path) as video:
        stretches = cut_stretches(video.info.duration_s, proposals)
        for segment in video.iter_segments(stretches, preprocessing.num_frames):
            yield stretches[segment.number], preprocess(segment.frames, preprocessing)


def _with_lengths(data: MomentSet) -> MomentSet:
    durations = []
    for path, known in zip(data.paths, data.durations_s, strict=True):
        try:
            durations.append(known if known is not None else probe(path).duration_s)
        except DataError as error:
            raise InvalidInput(f"the length of a video is not known: {error}") from error
    return replace(data, durations_s=tuple(durations))
