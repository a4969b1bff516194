"""From the name of a model under test to the model."""

from __future__ import annotations

from pathlib import Path

from vlm.evaluation.encoders.stored import StoredFeatures
from vlm.models import load_model
from vlm.types import VideoTextEncoder

_FEATURES = "features:"


def is_features(source: str | VideoTextEncoder) -> bool:
    """Whether a source names a file of features, for which no video needs to be there."""
    return isinstance(source, str) and (source.startswith(_FEATURES) or source.endswith(".npz"))


def open_encoder(
    source: str | VideoTextEncoder, num_frames: int | None, device: str
) -> VideoTextEncoder | StoredFeatures:
    """Return what a source names.

    Args:
        source: What ``load_model`` takes, ``features:FILE``, a ``.npz`` file of features, or a model that is
            there already, such as ``wrap_encoder`` makes.
        num_frames: Frames that the model is to take; None leaves it to the model.
        device: Where a loaded model runs.

    Raises:
        InvalidInput: There is no such model or file, or it cannot be used.
    """
    if not isinstance(source, str):
        return source
    if is_features(source):
        return StoredFeatures(Path(source.removeprefix(_FEATURES)))
    return load_model(source, device=device, num_frames=num_frames)
