"""Which videos look the same: a hash of what eight frames show, that survives encoding and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm.data.decoding import DecodeLimits, Frames, Source, open_video
from vlm.data.frame_sampling import middle_frames

_FRAMES, _SIDE = 8, 8
_GRAY_STEP = 4  # gray levels; less is noise of the encoder
_MIN_BITS = 40  # videos that show less than this cannot be told apart
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a video shows.

    Attributes:
        bits: (8 * 4 * 64,) bool: where each of eight small gray frames gets brighter or darker, to the right
            and downwards.
        duration_s: Its length.
    """

    bits: npt.NDArray[np.bool_]
    duration_s: float


class Near(NamedTuple):
    """Two videos that look the same: their numbers, and the share of differing bits among those set."""

    first: int
    second: int
    distance: float


def fingerprint(source: Source, limits: DecodeLimits | None = None) -> Fingerprint:
    """Hash the middle frames of eight equal spans.

    Raises:
        DataError: The video cannot be opened or decoded; see `open_video`.
    """
    video = open_video(source, limits)
    indices = middle_frames(video.info.num_frames, _FRAMES)
    small = {index: _small(frame) for index, frame in video.iterate(np.unique(indices))}
    bits = np.concatenate([_bits(small[index]) for index in indices.tolist()])
    return Fingerprint(bits, video.info.duration_s)


def near_videos(
    first: Sequence[Fingerprint], second: Sequence[Fingerprint] | None = None, max_distance: float = 0.3
) -> list[Near]:
    """Return all pairs whose lengths differ by less than a tenth (or half a second) and whose bits agree.

    Copies that were cut, mirrored or sped up are not found. Every pair of fitting length is compared, so
    nothing is missed; the cost grows with the square of their number.

    Args:
        first: Fingerprints; the pairs' first numbers refer to them.
        second: Others to compare with; None compares ``first`` with itself, each pair once, smaller number
            first.
        max_distance: Largest share of differing bits, 0 to 1.

    Returns:
        Pairs in ascending order.
    """
    others = first if second is None else second
    if not first or not others:
        return []
    order = np.argsort([print_.duration_s for print_ in others], kind="stable")
    lengths = np.array([others[number].duration_s for number in order])
    matrix = np.stack([others[number].bits for number in order])
    found: list[Near] = []
    by_length = sorted(range(len(first)), key=lambda number: first[number].duration_s)
    for start in range(0, len(by_length), _BLOCK):
        numbers = by_length[start : start + _BLOCK]
        low = np.searchsorted(lengths, _shortest(first[numbers[0]].duration_s), side="left")
        high = np.searchsorted(lengths, _longest(first[numbers[-1]].duration_s), side="right")
        for begin in range(int(low), int(high), 8 * _BLOCK):
            end = min(int(high), begin + 8 * _BLOCK)
            distances = _distances(np.stack([first[number].bits for number in numbers]), matrix[begin:end])
            for row, column in np.argwhere(distances <= max_distance).tolist():
                one, other = numbers[row], int(order[begin + column])
                length = lengths[begin + column]
                fits = _shortest(first[one].duration_s) <= length <= _longest(first[one].duration_s)
                if fits and (second is not None or one < other):
                    found.append(Near(one, other, round(float(distances[row, column]), 4)))
    return sorted(found)


def _shortest(seconds: float) -> float:
    return min(0.9 * seconds, seconds - 0.5)


def _longest(seconds: float) -> float:
    return max(seconds / 0.9, seconds + 0.5)


def _distances(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return (n, m) Jaccard distances; infinite where a video shows too little."""
    both = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float64)
    set_a, set_b = a.sum(axis=1), b.sum(axis=1)
    either = set_a[:, None] + set_b[None] - both
    distances: npt.NDArray[np.float64] = 1 - both / np.maximum(either, 1)
    distances[(set_a < _MIN_BITS)[:, None] | (set_b < _MIN_BITS)[None]] = np.inf
    return distances


def _small(frame: Frames) -> npt.NDArray[np.int16]:
    gray = Image.fromarray(frame).convert("L")
    return np.asarray(gray.resize((_SIDE + 1, _SIDE + 1), Image.Resampling.BOX), np.int16)


def _bits(small: npt.NDArray[np.int16]) -> npt.NDArray[np.bool_]:
    right = small[:_SIDE, 1:] - small[:_SIDE, :-1]
    down = small[1:, :_SIDE] - small[:-1, :_SIDE]
    return np.concatenate([(step > _GRAY_STEP).ravel() for step in (right, -right, down, -down)])
