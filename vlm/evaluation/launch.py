"""From what a user names (model, protocol, files) to the objects that an evaluation needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vlm.data.decoding import open_video
from vlm.data.frame_sampling import middle_frames
from vlm.data.preprocessing import preprocess
from vlm.errors import InvalidInput, UsageError
from vlm.evaluation.card import Card, read_card
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.protocol import Protocol, load_protocol
from vlm.evaluation.questions import evaluate_choices
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.evaluation.scores.corrections import Corrections
from vlm.evaluation.world_manifest import read_world, read_world_questions
from vlm.models import load_model
from vlm.types import Preprocessing, VideoTextEncoder


def evaluate_source(
    source: str,
    protocol_name: str,
    annotations: Path,
    videos: Path,
    *,
    controls: Sequence[str] = (),
    overrides: tuple[str, ...] = (),
    device: str = "auto",
    batch_size: int = 16,
    allow_missing: bool = False,
    test_time_controls: bool = True,
    corrections: Corrections | None = None,
) -> Card:
    """Evaluate a model that is named rather than given.

    Args:
        source: What ``load_model`` takes.
        protocol_name: A name of ``vlm eval list``.
        annotations: The protocol's annotation file.
        videos: Folder of the clips.
        controls: ``NAME=SOURCE`` or ``NAME=card.json`` of models trained with the same budget.
        overrides: ``key=value`` changes to the protocol; the card says what was measured.
        device: Where the models run.
        batch_size: Clips encoded at once.
        allow_missing: Leave unreadable clips out, and list them.
        test_time_controls: Also measure shuffled frames and the first frame only.
        corrections: Corrections of the embedding scores that are reported too.

    Raises:
        InvalidInput: Protocol, annotations, videos or model cannot be used.
        UsageError: A control or an override is not written as it should be.
    """
    protocol = load_protocol(protocol_name, overrides)
    named = [_named_control(control) for control in controls]
    data = read_annotations(protocol, annotations, videos)
    loaded: dict[str, VideoTextEncoder | Card] = {}
    for name, place in named:
        loaded[name] = read_card(Path(place)) if place.endswith(".json") else load_model(place, device=device)
    return evaluate_model(
        load_model(source, device=device),
        data,
        protocol,
        load_clip,
        source=source,
        options=RunOptions(
            batch_size=batch_size, allow_missing=allow_missing, test_time_controls=test_time_controls
        ),
        controls=loaded,
        corrections=corrections,
    )


def ask_source(
    source: str,
    protocol_name: str,
    annotations: Path,
    videos: Path,
    *,
    device: str = "auto",
    allow_missing: bool = False,
) -> Card:
    """Ask a model that is named rather than given every multiple-choice question; as ``evaluate_source``.

    Raises:
        InvalidInput: Protocol, annotations, videos or model cannot be used.
    """
    protocol = load_protocol(protocol_name)
    _check_folder(videos)
    data = read_world_questions(annotations, videos)
    model = load_model(source, device=device)
    return evaluate_choices(model, data, protocol, load_clip, source=source, allow_missing=allow_missing)


def read_annotations(protocol: Protocol, annotations: Path, videos: Path) -> EvaluationSet:
    """Read the annotations in the layout that the protocol names.

    Raises:
        InvalidInput: A file or folder is missing, or the annotations are not in that layout.
    """
    _check_folder(videos)
    return read_world(annotations, videos, protocol)


def load_clip(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Return a clip as the encoder takes it: the middle frames of equal spans, (t, 3, s, s) float32.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    with open_video(path) as video:
        frames = video.read(middle_frames(video.info.num_frames, preprocessing.num_frames))
    return preprocess(frames, preprocessing)


def _check_folder(videos: Path) -> None:
    if not videos.is_dir():
        raise InvalidInput(f"{videos}: no such folder of videos")


def _named_control(text: str) -> tuple[str, str]:
    name, separator, place = text.partition("=")
    if not separator or not name or not place:
        raise UsageError(f"--control: expected NAME=SOURCE or NAME=card.json, got {text!r}")
    return name, place
