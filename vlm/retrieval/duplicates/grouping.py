"""Ranked segments put together where their videos show the same footage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm.retrieval.duplicates.alignment import MAX_DISTANCE, Frames, Overlap, find_overlap
from vlm.retrieval.duplicates.hashing import NO_HASH
from vlm.retrieval.manifest import Snapshot

# like frames that two segments must have before their videos are aligned
_MIN_LIKE = 2


@dataclass(slots=True)
class Group:
    """A segment, by its place in the ranking, and those after it that show the same, with where they do."""

    place: int
    copies: list[tuple[int, Overlap]] = field(default_factory=list)


def group_alike(
    snapshot: Snapshot, rows: Sequence[int], grid_step_s: float | None = None, *, most: int | None = None
) -> list[Group]:
    """Group segments, the best first; each is in one group, that of the first it is a copy of.

    Args:
        snapshot: What the rows are of.
        rows: At most one of each video, the best first.
        grid_step_s: Of the index's manifest.
        most: How many groups are wanted, the first ones, each whole; all if None.
    """
    groups: list[Group] = []
    most, first, taken = len(rows) if most is None else most, 0, set[int]()
    hashes = snapshot.row_hashes[list(rows)]
    frames: dict[int, Frames] = {}

    def frames_of(row: int) -> Frames:
        if row not in frames:
            mine = np.flatnonzero(snapshot.row_video == snapshot.row_video[row])
            frames[row] = Frames.of_segments(
                snapshot.row_bounds[mine], snapshot.row_hashes[mine], grid_step_s
            )
        return frames[row]

    while len(groups) < most and first < len(rows):
        # as many as are wanted: mostly none of them is a copy, and the rest need not be compared
        may_be = _may_be_copies(hashes[first : first + most - len(groups)], hashes)
        for leader, others in enumerate(may_be, first):
            if leader in taken:
                continue
            group = Group(leader)
            groups.append(group)
            start_s, end_s = snapshot.row_bounds[rows[leader]].tolist()
            for place in np.flatnonzero(others).tolist():
                if place <= leader or place in taken:
                    continue
                overlap = find_overlap(frames_of(rows[leader]), frames_of(rows[place]), start_s, end_s)
                if overlap is not None:
                    group.copies.append((place, overlap))
                    taken.add(place)
        first += len(may_be)
    return groups


def _may_be_copies(leaders: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return (leaders, segments) bool from hashes (·, frames): whether enough frames are alike."""
    (count, num_frames), num_segments = leaders.shape, len(hashes)
    if num_frames < _MIN_LIKE:
        return np.zeros((count, num_segments), bool)
    flat = leaders.reshape(-1)
    has_like = np.zeros((len(flat), num_segments), bool)
    # frame by frame: the pairs of one fit in the processor's cache
    for others in hashes.T:
        has_like |= (np.bitwise_count(flat[:, None] ^ others) <= MAX_DISTANCE) & (others != NO_HASH)
    has_like[flat == NO_HASH] = False
    alike: np.ndarray = has_like.reshape(count, num_frames, num_segments).sum(axis=1) >= _MIN_LIKE
    return alike
