"""Score matrices as files hold them: number types, blocks of rows, refusal of what is not a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
BLOCK_BYTES = 64 * 2**20


def check_finite(scores: NDArray[Any]) -> None:
    """Refuse a matrix that holds a NaN or an infinity.

    Sorting puts NaN first or drops it, by library, and turns a broken model into a good one.

    Raises:
        ValueError: Says how many scores are not finite and where the first one is.
    """
    if scores.dtype.kind in "iu":
        return
    count, first = 0, (0, 0)
    for start, stop in row_blocks(len(scores), max(1, int(np.prod(scores.shape[1:])))):
        wrong = ~np.isfinite(promote(scores[start:stop]))
        found = int(np.count_nonzero(wrong))
        if found and not count:
            row, *rest = (int(i) for i in np.argwhere(wrong)[0])
            first = (start + row, rest[0] if rest else 0)
        count += found
    if count:
        raise ValueError(
            f"{count} of {scores.size} scores are not finite, the first at (query, item) = {first}; "
            "find the model or the clip that makes them: a rank among them means nothing"
        )


def promote(scores: NDArray[Any]) -> Floats:
    """Return scores as fp32; fp64 and integers wider than two bytes become fp64, so no order is lost.

    bfloat16 is known by its type, or as the nameless two bytes (``V2``) that NumPy loads such a file as.
    uint16 is refused: it may hold the bits of bfloat16, whose negative numbers sort backwards as integers.

    Raises:
        ValueError: The type is not a real number, or is uint16.
    """
    dtype = scores.dtype
    if dtype.name == "bfloat16":
        return np.asarray(scores.astype(np.float32))
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        # NumPy saves bfloat16 as two nameless bytes: the upper half of an fp32
        bits = np.ascontiguousarray(scores).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return np.asarray(bits.view(np.float32))
    if dtype == np.uint16:
        raise ValueError(
            "scores are uint16, which may be integers or the bits of bfloat16: save .view('V2') if they are "
            "bfloat16, .astype('int32') if they are integers"
        )
    if dtype.kind not in "fiu":
        raise ValueError(f"expected real scores (float, integer or bfloat16), got {dtype}")
    wide = dtype.itemsize > (4 if dtype.kind == "f" else 2)
    return scores.astype(np.float64 if wide else np.float32, copy=False)


def check_matrix(scores: NDArray[Any]) -> None:
    """Refuse what is not a matrix with at least one score.

    Raises:
        ValueError: Says the shape.
    """
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"expected a non-empty (queries, items) score matrix, got shape {scores.shape}")


def row_blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows that take ``BLOCK_BYTES`` in fp64."""
    size = max(1, BLOCK_BYTES // (8 * num_columns))
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)
