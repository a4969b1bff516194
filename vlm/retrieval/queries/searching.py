"""What every searcher does: nearest segments, graded, grouped by footage, merged by video.

How the segments are stored and found is left to who derives from this: an index, or a published store.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval.backends import Backend
from vlm.retrieval.backends.exact import Gatherable
from vlm.retrieval.catalog import VideoRow
from vlm.retrieval.duplicates.grouping import Group, group_alike
from vlm.retrieval.filters import Condition, parse_filter
from vlm.retrieval.manifest import IndexReader, Snapshot
from vlm.retrieval.queries.encoding import QueryEncoder
from vlm.retrieval.queries.mixing import EncodedQuery, add_up
from vlm.retrieval.queries.options import Aggregate, MinStrength, SearchOptions
from vlm.retrieval.queries.values import Mix, Moment
from vlm.retrieval.strength import Grader
from vlm.retrieval.words.ranking import fuse_moments, rank_without_model
from vlm.retrieval.words.search import NO_MODEL, WordSearch
from vlm.types import Duplicate, Hit, Strength, TextFeatures, VideoTextEncoder

if TYPE_CHECKING:
    from vlm.retrieval.queries.values import Query

_SEGMENTS_PER_HIT = 4
_COMPARED = 64
_FUSED = 256
_KEPT: dict[MinStrength, tuple[Strength, ...]] = {"strong": ("strong",), "weak": ("strong", "weak")}
# how far "not this one" moves a query away, in the query's own length
_AWAY = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A segment that was found, by its row, and the score that ranks it."""

    row: int
    score: float
    score_kind: str


class SnapshotSearcher(ABC):
    """Searches one generation at a time.

    Attributes:
        model: The model whose vectors are searched.
        index: What holds them.

    Raises:
        CapabilityError: The model cannot search.
    """

    index: IndexReader
    _vectors: Gatherable
    _backend: Backend
    _grader: Grader
    _words: WordSearch

    def __init__(self, model: VideoTextEncoder) -> None:
        if "search" not in model.capabilities:
            raise CapabilityError(f"model {model.name!r} ({model.kind}) cannot search")
        self.model, self._encoder = model, QueryEncoder(model)

    @property
    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The generation that is searched."""

    @abstractmethod
    def refresh(self) -> None:
        """Go on to the newest generation."""

    @abstractmethod
    def newest(self) -> SnapshotSearcher | None:
        """Return a searcher of the newest generation; None if all must be opened again."""

    @property
    def shares_passes(self) -> bool:
        """Whether searches at the same time cost less than one after another; see `Backend`."""
        return self._backend.shares_passes

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do with what is searched; see `VideoTextEncoder`."""
        return self.model.capabilities

    @abstractmethod
    def _rows_where(self, condition: Condition) -> np.ndarray:
        """Return the keys of the videos that satisfy a condition."""

    @abstractmethod
    def _match(self, text: TextFeatures, rows: Sequence[int]) -> dict[int, float]:
        """Return the matching head's log-odds of segments, by row."""

    def search(
        self,
        query: Query,
        *,
        top_k: int = 10,
        rerank: int = 0,
        where: str | None = None,
        aggregate: Aggregate = "max",
        min_strength: MinStrength | None = None,
        unlike: Sequence[Moment] = (),
        offset: int = 0,
        group: bool = True,
        words: bool = False,
    ) -> list[Hit]:
        """Return the best moments, at most one of each video.

        Args:
            query: A text; an image (PIL, or (h, w, 3) uint8 RGB); the path of an image or video file; a
                `Moment` of the index; a `Mix` of those; or what `encode` or `encode_segment` returned.
            top_k: How many videos to return at most.
            rerank: Score this many of the nearest segments again with the matching head (texts only). They
                come first, ``itm+itc@k`` (``itm@k`` without a `logit_scale`); the others follow, ``itc``.
            where: A filter on the videos, for example ``duration_s > 60 and path like '%holiday%'``.
            aggregate: What a video scores: ``max``, as its best segment does (a moment is looked for), or
                ``mean`` over its segments, as ``itc_mean`` (a subject is looked for). Either way the hit
                plays at the best segment.
            min_strength: Leave out what is weaker (texts only); nothing may be left.
            unlike: "Not these": their videos are left out, and what is like them comes later.
            offset: How many of the best to skip.
            group: Name videos that show the same footage as a better hit in its `duplicates`, instead of
                making them hits themselves.
            words: Also look for the text in names, folders, tags, and in the captions and subtitles that lie
                beside the videos; the two rankings are fused, as ``rrf``.

        Raises:
            InvalidInput: The query is empty, the filter cannot be read, or a number is out of range.
            DataError: The image or video file cannot be read.
            CapabilityError: The model lacks the ability, or the query is not one to rerank or to grade.
        """
        options = SearchOptions(
            top_k=top_k,
            offset=offset,
            rerank=rerank,
            where=where,
            aggregate=aggregate,
            min_strength=min_strength,
            unlike=unlike,
            group=group,
            words=words,
        )
        return self.page(self.encode(query), options)[0]

    def page(self, encoded: EncodedQuery, options: SearchOptions) -> tuple[list[Hit], bool]:
        """Return what `search` does, and whether more would follow."""
        options.check(self.model, encoded)
        allowed = fits = self._allowed(options.where, {moment.video_id for moment in options.unlike})
        vector = self._moved_away(encoded.vector, options.unlike)
        found = self._reranked(encoded, vector, options.rerank, allowed)
        if found:
            # a reranked video is ranked by its reranked segments alone
            owners = self.snapshot.row_video
            allowed = allowed & ~np.isin(owners, owners[[segment.row for segment in found]])
        by_mean = options.aggregate == "mean"
        if by_mean:
            found = self._by_mean(vector, allowed)
        first, end = self._best_of_each_video(found), options.offset + options.top_k
        # so many are compared with one another, however few are shown: pages must not depend on their length
        reach = _COMPARED * math.ceil(end / (_COMPARED // 2)) if options.group else end + 1
        while True:
            if self.model.kind == NO_MODEL:
                ranked = self._without_model(encoded, allowed)[:reach]
            elif options.words:
                seen = first + self._distinct(vector, max(_FUSED - len(first), 1), allowed)
                ranked = self._with_words(encoded, seen, fits)[:reach]
            elif not by_mean and len(first) < reach:
                ranked = first + self._distinct(vector, reach - len(first), allowed)
            else:
                ranked = first
            kept = self._graded(encoded, ranked, options.min_strength)
            groups = self._grouped(kept, options.group, end + 1)
            # in the embedding's order, whoever follows one that was too weak is weaker
            last = ranked[-1] if ranked and ranked[-1].score_kind == "itc" else None
            is_cut = last is not None and (not kept or kept[-1][0] is not last)
            if len(groups) > end or by_mean or len(ranked) < reach or is_cut:
                break
            reach *= 2
        hits = [self._hit(rank, kept, one) for rank, one in enumerate(groups[:end], start=1)]
        return hits[options.offset :], len(groups) > end

    def encode(self, query: Query) -> EncodedQuery:
        """Return what a query is compared by; this is the part of a search that runs the model.

        Raises:
            InvalidInput: The query is empty, or names a video that the index does not hold.
            DataError: The image or video file cannot be read.
        """
        if isinstance(query, EncodedQuery):
            return query
        if isinstance(query, Moment):
            return self.encode_segment(query.video_id, query.start_s)
        if isinstance(query, Mix) and self.model.kind == NO_MODEL:
            raise CapabilityError(
                "an index without a model is searched by one text, picture, video or moment"
            )
        if isinstance(query, Mix):
            return add_up([(part.weight, self.encode(part.query)) for part in query.parts])
        return self._encoder.encode(query)

    def encode_segment(self, video_id: str, start_s: float) -> EncodedQuery:
        """Return the stored vector of an indexed segment, to find more like it.

        Args:
            video_id: A video of the index.
            start_s: Where the segment begins, in seconds; the nearest beginning is taken.

        Raises:
            InvalidInput: The index holds no such video.
        """
        snapshot = self.snapshot
        video = snapshot.places.get(video_id)
        if video is None:
            raise InvalidInput(f"the index holds no video {video_id!r}")
        rows = np.flatnonzero(snapshot.row_video == video)
        nearest = int(np.argmin(np.abs(snapshot.row_bounds[rows, 0] - start_s)))
        row = int(rows[nearest])
        looks = snapshot.row_hashes[row]
        return EncodedQuery(
            vector=self._vectors.gather(rows[nearest : nearest + 1])[0].astype(np.float32),
            look=int(looks[len(looks) // 2]),
        )

    def bank_scores(self) -> list[float]:
        """Return the best score of each unrelated text, searched now; none of an index that holds nothing."""
        return self._grader.bank_scores()

    def unknown_words(self, query: str) -> list[str]:
        """Return the words of a text that the model cannot understand."""
        return self._encoder.unknown_words(query)

    def _allowed(self, where: str | None, without: set[str]) -> np.ndarray:
        """Return which rows pass the filter and are not of the videos named."""
        snapshot = self.snapshot
        if where is None and not without:
            return snapshot.alive
        fits = np.ones(len(snapshot.videos), bool)
        fits[[place for name in without if (place := snapshot.places.get(name)) is not None]] = False
        if where is not None:
            fits &= np.isin(snapshot.keys, self._rows_where(parse_filter(where)))
        if fits.all():
            return snapshot.alive
        allowed: np.ndarray = snapshot.alive & np.append(fits, False)[snapshot.row_video]
        return allowed

    def _moved_away(self, vector: np.ndarray, unlike: Sequence[Moment]) -> np.ndarray:
        if not unlike:
            return vector
        weight = -_AWAY / len(unlike)
        away = [(weight, self.encode(moment)) for moment in unlike]
        return add_up([(1.0, EncodedQuery(vector=vector)), *away]).vector

    def _reranked(
        self, encoded: EncodedQuery, vector: np.ndarray, count: int, allowed: np.ndarray
    ) -> list[_Found]:
        """Return the nearest segments as the matching head sees them; none if none are to be reranked."""
        if not count or encoded.text is None:
            return []
        scores, rows = (part.tolist() for part in self._ranked(vector, count, allowed))
        kind = "itm" if self.model.logit_scale is None else "itm+itc"
        found = [
            _Found(row=row, score=score, score_kind=f"{kind}@{count}")
            for row, score in self._rescored(encoded.text, rows, scores).items()
        ]
        return sorted(found, key=lambda segment: (-segment.score, segment.row))

    def _rescored(self, text: TextFeatures, rows: Sequence[int], scores: Sequence[float]) -> dict[int, float]:
        """Return what head and embedding say together of segments with these embedding scores, by row."""
        odds, scale = self._match(text, rows), self.model.logit_scale or 0.0
        pairs = zip(rows, scores, strict=True)
        return {row: odds[row] + scale * score for row, score in pairs if row in odds}

    def _graded(
        self, encoded: EncodedQuery, found: Sequence[_Found], least: MinStrength | None
    ) -> list[tuple[_Found, Strength | None]]:
        """Return segments with their grades, without those that are weaker than asked for."""
        if encoded.text is None:
            return [(segment, None) for segment in found]
        rows = np.array([segment.row for segment in found], np.int64)
        scores = self._vectors.gather(rows).astype(np.float64) @ encoded.vector.astype(np.float64)
        again = [segment.score if segment.score_kind.startswith("itm") else None for segment in found]
        grades = self._grader.grade(scores.tolist(), again)
        pairs = zip(found, grades, strict=True)
        return [(one, grade) for one, grade in pairs if least is None or grade in _KEPT[least]]

    def _grouped(self, kept: Sequence[tuple[_Found, Strength | None]], group: bool, most: int) -> list[Group]:
        if not group:
            return [Group(place) for place in range(min(most, len(kept)))]
        rows = [segment.row for segment, _ in kept]
        return group_alike(self.snapshot, rows, self.index.manifest.grid_step_s, most=most)

    def _nearest(self, vector: np.ndarray, count: int, allowed: np.ndarray) -> list[_Found]:
        return _as_found(*self._ranked(vector, count, allowed))

    def _ranked(self, vector: np.ndarray, count: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the nearest segments, the best first."""
        count = min(count, int(np.count_nonzero(allowed)))
        if not count:
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        scores, rows = self._backend.search(vector[None], count, None if allowed.all() else allowed)
        is_there = rows[0] >= 0
        return scores[0][is_there], rows[0][is_there]

    def _distinct(self, vector: np.ndarray, top_k: int, allowed: np.ndarray) -> list[_Found]:
        """Return the best segment of each of the `top_k` nearest videos."""
        total = int(np.count_nonzero(allowed))
        count = min(top_k * _SEGMENTS_PER_HIT, total)
        while True:
            scores, rows = self._ranked(vector, count, allowed)
            # before they become objects: most of the segments are of videos that have a better one
            firsts = np.sort(np.unique(self.snapshot.row_video[rows], return_index=True)[1])
            if len(firsts) >= top_k or count >= total:
                return _as_found(scores[firsts[:top_k]], rows[firsts[:top_k]])
            count = min(count * 4, total)

    def _by_mean(self, vector: np.ndarray, allowed: np.ndarray) -> list[_Found]:
        """Return the best segment of each video with the mean over its segments, the best mean first."""
        segments = self._nearest(vector, int(np.count_nonzero(allowed)), allowed)
        owners = self.snapshot.row_video
        scores: dict[int, list[float]] = defaultdict(list)
        for segment in segments:
            scores[int(owners[segment.row])].append(segment.score)
        means = {video: math.fsum(values) / len(values) for video, values in scores.items()}
        best = self._best_of_each_video(segments)
        found = [
            _Found(row=segment.row, score=means[int(owners[segment.row])], score_kind="itc_mean")
            for segment in best
        ]
        return sorted(found, key=lambda segment: (-segment.score, segment.row))

    def _without_model(self, encoded: EncodedQuery, allowed: np.ndarray) -> list[_Found]:
        kind, ranked = rank_without_model(self.snapshot, self._words, encoded, allowed)
        return [_Found(row=row, score=score, score_kind=kind) for row, score in ranked]

    def _with_words(self, encoded: EncodedQuery, seen: Sequence[_Found], allowed: np.ndarray) -> list[_Found]:
        assert encoded.words is not None
        mentions = self._words.find(encoded.words, allowed)[:_FUSED]
        ranked = fuse_moments(self.snapshot, [segment.row for segment in seen], mentions)
        return [_Found(row=row, score=score, score_kind="rrf") for row, score in ranked]

    def _best_of_each_video(self, segments: Iterable[_Found]) -> list[_Found]:
        best: dict[int, _Found] = {}
        for segment in segments:
            best.setdefault(int(self.snapshot.row_video[segment.row]), segment)
        return list(best.values())

    def _hit(self, rank: int, ranked: Sequence[tuple[_Found, Strength | None]], group: Group) -> Hit:
        snapshot = self.snapshot
        segment, strength = ranked[group.place]
        video = self._video(segment)
        start_s, end_s = snapshot.row_bounds[segment.row].tolist()
        is_foreign = self.model.domain != "open" and video.domain != self.model.domain
        copies = [(self._video(ranked[place][0]), overlap) for place, overlap in group.copies]
        return Hit(
            rank=rank,
            video_id=video.video_id,
            path=os.fsdecode(video.path),
            start_s=start_s,
            end_s=end_s,
            score=segment.score,
            score_kind=segment.score_kind,
            warning=f"{self.model.name} knows only the {self.model.domain}: this hit is random"
            if is_foreign
            else None,
            strength=strength,
            duplicates=tuple(
                Duplicate(
                    video_id=copy.video_id,
                    path=os.fsdecode(copy.path),
                    start_s=overlap.other_start_s,
                    end_s=overlap.other_end_s,
                    own_start_s=overlap.start_s,
                    own_end_s=overlap.end_s,
                )
                for copy, overlap in copies
            ),
        )

    def _video(self, segment: _Found) -> VideoRow:
        snapshot = self.snapshot
        return snapshot.videos[int(snapshot.row_video[segment.row])]


def _as_found(scores: np.ndarray, rows: np.ndarray) -> list[_Found]:
    pairs = zip(scores.tolist(), rows.tolist(), strict=True)
    return [_Found(row=row, score=score, score_kind="itc") for score, row in pairs]
