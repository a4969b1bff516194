"""The best scores of unrelated texts in one index, kept beside it: a cache that can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm.errors import IntegrityError, NoSpaceError
from vlm.retrieval.durability import read_sealed, write_sealed
from vlm.types import Strength

NAME = "strength.json"
# a hit is strong where one unrelated text in ten finds as good a one, weak above their middle
_STRONG, _WEAK = 0.9, 0.5
# an index that grew or shrank by less is graded as before
_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What unrelated texts find in an index.

    Attributes:
        bank: Hash of the texts and the model.
        num_rows: Segments of the index when it was calibrated.
        scores: The best embedding score of each text.
        reranked: The best score of each text that the matching head was asked about, as a search reranks.
    """

    bank: str
    num_rows: int
    scores: tuple[float, ...]
    reranked: tuple[float, ...] = ()

    def fits(self, bank: str, num_rows: int) -> bool:
        """Whether it serves an index of so many segments."""
        return self.bank == bank and abs(num_rows - self.num_rows) <= _TOLERANCE * self.num_rows

    def grade(self, scores: np.ndarray) -> list[Strength]:
        """Grade hits by their embedding scores (hits,)."""
        return _grade(scores, self.scores)

    def grade_reranked(self, scores: np.ndarray) -> list[Strength]:
        """Grade hits by the scores (hits,) by which they were reranked."""
        return _grade(scores, self.reranked)


def load(folder: Path) -> Calibration | None:
    """Return the calibration in a cache folder if it is what was written."""
    try:
        values = read_sealed(folder / NAME)
        for name in ("scores", "reranked"):
            values[name] = tuple(values[name])
        return Calibration(**values)
    except (OSError, IntegrityError, TypeError, KeyError):
        return None


def save(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration if there is a place to: a reader may have no right or no room to write."""
    with suppress(OSError, NoSpaceError, IntegrityError):
        folder.mkdir(exist_ok=True)
        write_sealed(folder / NAME, asdict(calibration))


def damaged(folder: Path) -> str | None:
    """Return what is wrong with the file, if it is there and not what was written."""
    try:
        read_sealed(folder / NAME)
    except FileNotFoundError:
        return None
    except (OSError, IntegrityError, ValueError) as error:
        return f"its content changed ({error})"
    return None


def drop(folder: Path) -> None:
    """Remove the file; the next search makes it again."""
    (folder / NAME).unlink(missing_ok=True)


def _grade(values: np.ndarray, bank: tuple[float, ...]) -> list[Strength]:
    weak, strong = _levels(bank)
    grades: Sequence[Strength] = ("unrelated", "weak", "strong")
    places = (values > weak).astype(int) + (values > max(strong, weak))
    return [grades[place] for place in places.tolist()]


@lru_cache(maxsize=64)
def _levels(bank: tuple[float, ...]) -> tuple[float, float]:
    """Return what half of the unrelated texts reach, and what one in ten does."""
    middle, high = np.quantile(np.array(bank), (_WEAK, _STRONG))
    return float(middle), float(high)
