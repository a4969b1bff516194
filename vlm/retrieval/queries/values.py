"""The kinds of queries, and sums of them: a + b - c."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from vlm.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from vlm.retrieval.queries.mixing import EncodedQuery

SingleQuery: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray | Clip | Moment | EncodedQuery"
Query: TypeAlias = "SingleQuery | Mix"

MAX_PARTS = 16
_MAX_WEIGHT = 100.0


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A file that is decoded already: `frames` are (t, 3, h, w) float32, prepared for the model."""

    frames: np.ndarray


@dataclass(frozen=True, slots=True)
class Moment:
    """An indexed segment as a query: that of `video_id` which begins nearest to `start_s` seconds."""

    video_id: str
    start_s: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.start_s):
            raise InvalidInput(f"a moment begins at a number of seconds, got {self.start_s}")


@dataclass(frozen=True, slots=True)
class Part:
    """One query of a sum, and what it is multiplied by; a negative weight takes it away."""

    query: SingleQuery
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < abs(self.weight) <= _MAX_WEIGHT:
            raise InvalidInput(
                f"expected a weight other than 0, at most {_MAX_WEIGHT:g} either way, got {self.weight}"
            )


@dataclass(frozen=True, slots=True)
class Mix:
    """A weighted sum of queries, each of length 1 before it is weighted, brought to length 1 again.

    Raises:
        InvalidInput: It has no parts or too many, or all of them are taken away.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise InvalidInput(f"expected 1 to {MAX_PARTS} queries in a sum, got {len(self.parts)}")
        if all(part.weight < 0 for part in self.parts):
            raise InvalidInput("something must be looked for before anything can be taken away")
