"""Queries with their true windows as an evaluation takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm.data.annotations.benchmarks import Moment, content_hash, video_key
from vlm.errors import InvalidInput
from vlm.evaluation.benchmarks.reading import locate, read_records, require_counts
from vlm.evaluation.protocol import Protocol
from vlm.metrics.matrices import Floats, Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class MomentSet:
    """Queries, their windows, and the videos that these lie in.

    Attributes:
        query_ids: What predictions name the queries by.
        queries: Texts, in the same order.
        query_video: (queries,) which video each is about.
        truths: Of each query (m, 2) seconds, at least one; as annotated, empty ones and late ones too.
        ratings: Of each query (clips, people), or None where nobody rated clips.
        video_ids: Names of the videos.
        paths: Their files.
        durations_s: Lengths in seconds; None where the annotations do not say.
        annotations_sha256: Hash of the content, the same in whatever layout it came.
        annotation_files: Name → sha256 of what was read.
    """

    query_ids: tuple[str, ...]
    queries: tuple[str, ...]
    query_video: Ints
    truths: tuple[Floats, ...]
    ratings: tuple[NDArray[np.float64] | None, ...]
    video_ids: tuple[str, ...]
    paths: tuple[Path, ...]
    durations_s: tuple[float | None, ...]
    annotations_sha256: str
    annotation_files: dict[str, str]

    @property
    def num_unreachable(self) -> int:
        """Queries of which no true window has a length above zero: nothing can overlap them."""
        return sum(not (truth[:, 1] > truth[:, 0]).any() for truth in self.truths)

    def without_videos(self, lost: set[int]) -> MomentSet:
        """Return the set without some videos and the queries about them."""
        kept = [video for video in range(len(self.video_ids)) if video not in lost]
        place = {video: number for number, video in enumerate(kept)}
        asked = [query for query, video in enumerate(self.query_video.tolist()) if video in place]
        return replace(
            self,
            query_ids=tuple(self.query_ids[query] for query in asked),
            queries=tuple(self.queries[query] for query in asked),
            query_video=np.asarray([place[int(self.query_video[query])] for query in asked], np.int64),
            truths=tuple(self.truths[query] for query in asked),
            ratings=tuple(self.ratings[query] for query in asked),
            video_ids=tuple(self.video_ids[video] for video in kept),
            paths=tuple(self.paths[video] for video in kept),
            durations_s=tuple(self.durations_s[video] for video in kept),
        )


def read_moment_set(protocol: Protocol, annotations: Path, videos: Path | None) -> MomentSet:
    """Read the queries of a protocol for moments, in the file's order, the videos in order of their keys.

    Args:
        protocol: What to measure.
        annotations: The main file or the folder of all.
        videos: Folder of the videos; None where none will be opened.

    Raises:
        InvalidInput: The annotations cannot be used, do not hold what the protocol expects, name a query
            twice, or a query has no window or a rated clip beyond the video's end.
    """
    assert protocol.moments is not None, "a protocol for moments has their settings"
    found = read_records(protocol, annotations)
    require_counts(protocol, found)
    moments = [record for record in found.records if isinstance(record, Moment)]
    keys = [video_key(name) for name in found.videos]
    column = {key: place for place, key in enumerate(keys)}
    durations: list[float | None] = [None] * len(keys)
    seen: set[str] = set()
    for moment in moments:
        if moment.query_id in seen:
            raise InvalidInput(f"{annotations}: query {moment.query_id!r} stands there twice")
        seen.add(moment.query_id)
        windows = np.asarray(moment.windows, np.float64)
        if not moment.windows or not np.isfinite(windows).all():
            raise InvalidInput(
                f"{annotations}: query {moment.query_id!r}: expected at least one window of finite seconds, "
                f"got {list(moment.windows)}"
            )
        video = column[video_key(moment.video)]
        known = durations[video]
        durations[video] = moment.duration_s if known is None else max(known, moment.duration_s or known)
    return MomentSet(
        query_ids=tuple(moment.query_id for moment in moments),
        queries=tuple(moment.query for moment in moments),
        query_video=np.asarray([column[video_key(moment.video)] for moment in moments], np.int64),
        truths=tuple(np.asarray(moment.windows, np.float64) for moment in moments),
        ratings=tuple(_ratings(moment, protocol.moments.clip_s, annotations) for moment in moments),
        video_ids=tuple(keys),
        paths=locate(videos, found.videos, protocol),
        durations_s=tuple(durations),
        annotations_sha256=content_hash(moments),
        annotation_files=found.files,
    )


def _ratings(moment: Moment, clip_s: float, annotations: Path) -> NDArray[np.float64] | None:
    """Return (clips, people), 0 for the clips that nobody was asked about."""
    if not moment.ratings:
        return None
    num_clips = int((moment.duration_s or 0) / clip_s)
    people = {len(scores) for _, scores in moment.ratings}
    last = max(clip for clip, _ in moment.ratings)
    if last >= num_clips or min(clip for clip, _ in moment.ratings) < 0 or len(people) != 1 or 0 in people:
        raise InvalidInput(
            f"{annotations}: query {moment.query_id!r}: expected ratings of as many people for each clip, of "
            f"the {num_clips} clips of {clip_s:g} s in a video of {moment.duration_s} s; got clip {last}"
        )
    table = np.zeros((num_clips, people.pop()))
    for clip, scores in moment.ratings:
        table[clip] = scores
    return table
