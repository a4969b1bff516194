"""Texts such as people search by, to measure what a structure finds of texts.

Put together from parts, so that neighbours share a subject, a deed or a place, as real queries do.
"""

from __future__ import annotations

import itertools

import numpy as np

from vlm.types import VideoTextEncoder

_SUBJECTS = (
    "a dog", "two children", "an old man", "a woman in a red coat", "a cat", "a crowd of people",
    "a cyclist", "a band", "a horse", "a chef",
)  # fmt: skip
_DEEDS = (
    "running", "dancing", "talking to the camera", "jumping over something", "eating", "falling down",
    "waving goodbye", "opening a box", "playing with a ball", "looking up",
)  # fmt: skip
_PLACES = (
    "on a beach", "in a kitchen", "in the snow", "on a stage", "in a park", "on a busy street", "by a lake",
    "at a birthday party", "in an office", "at night",
)  # fmt: skip
_EVERY = 8  # 125 of the thousand; an odd part of each hundred, so that all parts take turns
_BATCH = 25


def everyday_texts() -> list[str]:
    """Return 125 different texts, always the same."""
    return [" ".join(parts) for parts in itertools.product(_SUBJECTS, _DEEDS, _PLACES)][::_EVERY]


def embed_everyday_texts(model: VideoTextEncoder) -> np.ndarray:
    """Return the embeddings (125, dim) float32 that a model gives them."""
    import torch

    texts = everyday_texts()
    with torch.inference_mode():
        parts = [
            model.encode_text(texts[first : first + _BATCH]).embedding.float().cpu().numpy()
            for first in range(0, len(texts), _BATCH)
        ]
    return np.concatenate(parts)
