"""A picture in 64 bits that survive re-encoding and resizing: which coarse waves are above their middle."""

from __future__ import annotations

import math

import numpy as np

from vlm.types import Preprocessing

_SIDE, _WAVES = 32, 8
# a picture with less contrast than this, in grey levels, has no shape to be known by
_FLAT = 2.0
NO_HASH = 0


def _cosines() -> np.ndarray:
    """Return (8, 32): the slowest waves over a line of 32, without the constant one."""
    positions = (np.arange(_SIDE) + 0.5) * math.pi / _SIDE
    waves: np.ndarray = np.cos(np.arange(1, _WAVES + 1)[:, None] * positions).astype(np.float32)
    return waves


_COSINES = _cosines()


def grey_of(preprocessing: Preprocessing) -> tuple[np.ndarray, float]:
    """Return what makes grey levels (0 to 255) of preprocessed channels: three factors, and what is added."""
    factors = 255 / 3 * np.array(preprocessing.std)
    return factors, float(255 / 3 * sum(preprocessing.mean))


def hash_frames(frames: np.ndarray, grey: tuple[np.ndarray, float]) -> np.ndarray:
    """Return one hash for each frame.

    Args:
        frames: (frames, 3, height, width).
        grey: What makes grey levels of it, see `grey_of`.

    Returns:
        (frames,) uint64; `NO_HASH` for frames without contrast.

    Source: Zauner 2010, Implementation and benchmarking of perceptual image hash functions, section 3.1.
    """
    factors, offset = grey
    levels = np.tensordot(factors.astype(np.float32), frames, axes=(0, 1)) + offset
    small = _shrunk(levels)
    waves = _COSINES @ small @ _COSINES.T
    flat = waves.reshape(len(frames), -1)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    packed = np.packbits(bits, axis=1)
    hashes = packed.view(np.uint64)[:, 0].copy()
    hashes[small.std(axis=(1, 2)) < _FLAT] = NO_HASH
    return hashes


def _shrunk(levels: np.ndarray) -> np.ndarray:
    """Return (n, 32, 32): means over nearly equal blocks of (n, height, width)."""
    for axis in (1, 2):
        # small pictures grow by whole factors
        levels = np.repeat(levels, max(1, -(-_SIDE // levels.shape[axis])), axis=axis)
    height, width = levels.shape[1:]
    rows, columns = (np.linspace(0, side, _SIDE + 1).astype(int)[:-1] for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(levels, rows, axis=1), columns, axis=2)
    counts = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    means: np.ndarray = (sums / counts).astype(np.float32)
    return means
