"""Ranked segments put together where their videos show the same footage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm.retrieval.duplicates.alignment import MAX_DISTANCE, Frames, Overlap, distances, find_overlap
from vlm.retrieval.manifest import Snapshot

# like frames that two segments must have before their videos are aligned
_MIN_LIKE = 2


@dataclass(slots=True)
class Group:
    """A segment, by its place in the ranking, and those after it that show the same, with where they do."""

    place: int
    copies: list[tuple[int, Overlap]] = field(default_factory=list)


def group_alike(snapshot: Snapshot, rows: Sequence[int]) -> list[Group]:
    """Group segments, the best first; each is in one group, that of the first it is a copy of.

    Args:
        snapshot: What the rows are of.
        rows: At most one of each video, the best first.
    """
    groups: list[Group] = []
    may_be = _may_be_copies(snapshot.row_hashes[list(rows)])
    frames: dict[int, Frames] = {}

    def frames_of(row: int) -> Frames:
        if row not in frames:
            mine = np.flatnonzero(snapshot.row_video == snapshot.row_video[row])
            frames[row] = Frames.of_segments(snapshot.row_bounds[mine], snapshot.row_hashes[mine])
        return frames[row]

    for place, row in enumerate(rows):
        for group in groups:
            leader = rows[group.place]
            if not may_be[group.place, place]:
                continue
            start_s, end_s = snapshot.row_bounds[leader].tolist()
            overlap = find_overlap(frames_of(leader), frames_of(row), start_s, end_s)
            if overlap is not None:
                group.copies.append((place, overlap))
                break
        else:
            groups.append(Group(place))
    return groups


def _may_be_copies(hashes: np.ndarray) -> np.ndarray:
    """Return (segments, segments) bool from hashes (segments, frames): whether enough frames are alike."""
    count, num_frames = hashes.shape
    if not num_frames:
        return np.zeros((count, count), bool)
    flat = hashes.reshape(-1)
    is_like = distances(flat[:, None], flat[None]) <= MAX_DISTANCE
    has_like = is_like.reshape(count, num_frames, count, num_frames).any(axis=3)
    alike: np.ndarray = has_like.sum(axis=1) >= _MIN_LIKE
    return alike
