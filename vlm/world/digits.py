"""The handwritten digits, carried with the package, and which writers belong to which split."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

_FILE = Path(__file__).parent / "assets" / "digits.npz"

# cut where a new writer begins: a random split would put the same hand on both sides
BLOCKS = {"train": (0, 1157), "val": (1157, 1415), "test": (1415, 1797)}


@lru_cache(maxsize=1)
def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return all images (1797, 8, 8), values 0 to 16, and their labels (1797,), both read-only."""
    with np.load(_FILE) as archive:
        images, labels = archive["images"], archive["labels"]
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@lru_cache(maxsize=64)
def images_of(block: str, digit: int) -> tuple[int, ...]:
    """Return the indices of all images of ``digit`` by the writers of ``block`` (a key of ``BLOCKS``)."""
    first, last = BLOCKS[block]
    labels = load_digits()[1]
    return tuple(int(index) for index in range(first, last) if labels[index] == digit)
