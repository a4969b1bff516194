"""Annotations as an evaluation sees them: clips, queries, which is true of which, who is whose twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.errors import InvalidInput
from vlm.metrics import Positives
from vlm.metrics.matrices import Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Foil:
    """A text that differs in one thing, of the named kind, from a query, and is false of the query's clip."""

    query: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """Queries against a gallery.

    Attributes:
        clip_ids: Stable names of the gallery's clips; (items,).
        paths: Their files; (items,).
        queries: Captions; (queries,).
        query_clip: The clip that each caption was written for; (queries,) int64.
        positives: The right clips of each query.
        groups: The unit of resampling of each clip, shared by a clip and its twin; (items,) int64.
        twin_of: Column of each clip's reversed twin, -1 without one; (items,) int64.
        tiers: Name of the kind of each query, for the table by tier; (queries,) or empty.
        oracles: Name → scores (queries, items) of whoever knows only a part of the truth.
        annotations_sha256: Of the annotation file, or of its content where several layouts hold the same.
        annotation_files: Name → sha256 of each file that was read, where there are several layouts.
        foils: Texts that differ from a query in one thing.
        missing: Clips that were left out, each with its reason.
    """

    clip_ids: tuple[str, ...]
    paths: tuple[Path, ...]
    queries: tuple[str, ...]
    query_clip: Ints
    positives: Positives
    groups: Ints
    twin_of: Ints
    tiers: tuple[str, ...] = ()
    oracles: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    annotations_sha256: str = ""
    annotation_files: Mapping[str, str] = field(default_factory=dict)
    foils: tuple[Foil, ...] = ()
    missing: tuple[tuple[str, str], ...] = field(default=())

    def without(self, rejected: Sequence[tuple[int, str]]) -> EvaluationSet:
        """Return the set without some clips, and without the queries written for them.

        Args:
            rejected: (clip, reason) pairs; they are kept in ``missing``.

        Raises:
            InvalidInput: Nothing would be left.
        """
        if not rejected:
            return self
        keep = np.ones(len(self.clip_ids), bool)
        keep[[clip for clip, _ in rejected]] = False
        kept_queries = np.flatnonzero(keep[self.query_clip])
        if not len(kept_queries):
            raise InvalidInput("no clip can be read, so there is nothing to evaluate")
        column = np.where(keep, np.cumsum(keep) - 1, -1)
        lists = [
            [int(column[item]) for item in self.positives[query] if keep[item]]
            for query in kept_queries.tolist()
        ]
        place = {int(query): number for number, query in enumerate(kept_queries)}
        twins = np.where(self.twin_of >= 0, column[self.twin_of], -1)[keep]
        return replace(
            self,
            clip_ids=tuple(np.asarray(self.clip_ids, object)[keep]),
            paths=tuple(np.asarray(self.paths, object)[keep]),
            queries=tuple(self.queries[query] for query in kept_queries),
            query_clip=column[self.query_clip[kept_queries]],
            positives=Positives.from_lists(lists, int(keep.sum())),
            groups=self.groups[keep],
            twin_of=twins,
            oracles={name: scores[kept_queries][:, keep] for name, scores in self.oracles.items()},
            tiers=tuple(self.tiers[query] for query in kept_queries) if self.tiers else (),
            foils=tuple(replace(foil, query=place[foil.query]) for foil in self.foils if foil.query in place),
            missing=(*self.missing, *((self.clip_ids[clip], reason) for clip, reason in rejected)),
        )

    @property
    def twin_pairs(self) -> NDArray[np.int64]:
        """Queries of both clips of each twin pair that have one query each; (pairs, 2) int64."""
        query_of = {int(clip): query for query, clip in reversed(list(enumerate(self.query_clip)))}
        pairs = [
            (query_of[clip], query_of[int(twin)])
            for clip, twin in enumerate(self.twin_of)
            if clip < twin and clip in query_of and int(twin) in query_of
        ]
        return np.asarray(pairs, np.int64).reshape(-1, 2)


def refuse_missing(
    missing: Sequence[tuple[str, str]], num_videos: int, allowed: bool | int, noun: str = "clips"
) -> None:
    """Raise if more videos cannot be read than may be left out; call it before hours are spent, too.

    Args:
        missing: (name, reason) of each that cannot be read.
        num_videos: How many there should be.
        allowed: Whether they may be left out, or how many may.
        noun: What the annotations call a video.

    Raises:
        InvalidInput: There are more; the first of them are named.
    """
    if allowed is True or len(missing) <= int(allowed):
        return
    shown = "; ".join(f"{name}: {reason}" for name, reason in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise InvalidInput(
        f"{len(missing)} of {num_videos} {noun} cannot be read ({shown}{more}); what is left scores "
        "otherwise, so nothing was measured; --allow-missing leaves them out and lists them, "
        "--allow-missing N at most N"
    )
