"""Encoded queries, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm.errors import InvalidInput
from vlm.types import TextFeatures

# sums shorter than this are the rounding of parts that are one and the same
_CANCELLED = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedQuery:
    """A query that has been through the model, to be searched for more than once.

    Attributes:
        vector: (dim,) float32.
        text: The features of a text, which reranking needs; None for pictures, moments and sums.
        words: The text itself, to be looked for in what is written about the videos.
        look: The hash of a frame, which stands for a moment or picture where there is no model.
    """

    vector: np.ndarray
    text: TextFeatures | None = None
    words: str | None = None
    look: int | None = None


def add_up(encoded: list[tuple[float, EncodedQuery]]) -> EncodedQuery:
    """Return the weighted sum of encoded queries; one alone with a positive weight stays as it is.

    Raises:
        InvalidInput: The parts cancel each other out.
    """
    if len(encoded) == 1:
        return encoded[0][1]
    total = np.zeros_like(encoded[0][1].vector, dtype=np.float64)
    for weight, part in encoded:
        wide = part.vector.astype(np.float64)
        total += weight * wide / max(float(np.linalg.norm(wide)), 1e-12)
    length = float(np.linalg.norm(total))
    if length < _CANCELLED:
        raise InvalidInput("the queries of this sum cancel each other out; nothing is left to look for")
    return EncodedQuery(vector=(total / length).astype(np.float32))
