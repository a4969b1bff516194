"""From scores to the outcome of every query: both directions, each kind of score, and twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.errors import InvalidInput
from vlm.evaluation.card import as_json, counts_as_json, measure
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.protocol import BootstrapSettings
from vlm.metrics import (
    Adjustment,
    Positives,
    RankCounts,
    chance_counts,
    check_finite,
    merge_duplicates,
    pair_positives,
    rank_candidates,
    rank_scores,
    twin_scores,
)
from vlm.metrics.matrices import Floats, Ints

Outcome = tuple[RankCounts, Ints]


@dataclass(slots=True)
class Outcomes:
    """What happened, by direction and kind of score.

    Attributes:
        ranks: direction → kind → (counts, groups of resampling).
        twins: kind → measures of the twin gallery.
        cut_ties: direction → kind → queries whose candidates were cut within a tie.
        rerank_seconds: Time in the matching head.
        num_pairs: Pairs that the matching head scored.
        shared: The positives where equal captions share theirs; None if that changes nothing.
        shared_ranks: As ``ranks``, by the ``shared`` positives.
    """

    ranks: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    twins: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut_ties: dict[str, dict[str, int]] = field(default_factory=dict)
    rerank_seconds: float = 0.0
    num_pairs: int = 0
    shared: Positives | None = None
    shared_ranks: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def add(self, direction: str, kind: str, counts: RankCounts, groups: Ints) -> None:
        """Add the outcome of one direction and kind."""
        self.ranks.setdefault(direction, {})[kind] = (counts, groups)

    def rank(
        self,
        direction: str,
        kind: str,
        scores: NDArray[Any],
        positives: Positives,
        groups: Ints,
        adjust: Adjustment | None = None,
    ) -> None:
        """Rank finite scores in one direction, by the positives and by those that equal captions share.

        Args:
            direction: ``query_to_item`` or ``item_to_query``.
            kind: Name of the kind of score.
            scores: One row for each query of the direction.
            positives: The right items of each caption, whatever the direction.
            groups: Unit of resampling of each query of the direction.
            adjust: As in ``rank_scores``.
        """
        self.add(direction, kind, _ranks(direction, scores, positives, adjust), groups)
        if self.shared is not None:
            counts = _ranks(direction, scores, self.shared, adjust)
            self.shared_ranks.setdefault(direction, {})[kind] = (counts, groups)

    def rerank(
        self, direction: str, kind: str, candidates: Ints, scores: Floats, positives: Positives, groups: Ints
    ) -> None:
        """Rank some items of each query as ``rank_candidates`` does; arguments otherwise as in ``rank``."""

        def ranks(right: Positives) -> RankCounts:
            own = right if direction == "query_to_item" else right.reversed()[0]
            return rank_candidates(candidates, scores, own)

        self.add(direction, kind, ranks(positives), groups)
        if self.shared is not None:
            self.shared_ranks.setdefault(direction, {})[kind] = (ranks(self.shared), groups)

    def results(
        self, recall_at: tuple[int, ...], bootstrap: BootstrapSettings, kinds: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """Return the card's ``results`` section, of all kinds of score or of some."""
        chosen = {
            direction: {kind: found[kind] for kind in kinds or found}
            for direction, found in self.ranks.items()
        }
        return _measures(chosen, recall_at, bootstrap)

    def shared_results(self, recall_at: tuple[int, ...], bootstrap: BootstrapSettings) -> dict[str, Any]:
        """Return what ``results`` would be if equal captions shared their positives."""
        return _measures(self.shared_ranks, recall_at, bootstrap)

    def ties(self) -> dict[str, Any]:
        """Return the number of tied queries by direction and kind."""
        return {
            direction: {kind: int(counts.is_tied.sum()) for kind, (counts, _) in kinds.items()}
            for direction, kinds in self.ranks.items()
        }

    def per_query(self) -> dict[str, Any]:
        """Return the outcome of each query, as ``compare`` needs it."""
        return {
            direction: {kind: counts_as_json(*outcome) for kind, outcome in kinds.items()}
            for direction, kinds in self.ranks.items()
        }


def matrix_outcomes(
    scores: NDArray[Any],
    positives: Positives,
    kind: str,
    *,
    item_groups: Ints | None = None,
    query_groups: Ints | None = None,
    shared: Positives | None = None,
) -> Outcomes:
    """Rank a full score matrix in both directions.

    Args:
        scores: (queries, items).
        positives: The right items of each query.
        kind: Name of the kind of score.
        item_groups: Unit of resampling of each item; every item by itself if None.
        query_groups: Unit of resampling of each query; that of its first positive if None.
        shared: The positives where equal captions share theirs, to be reported too.

    Raises:
        InvalidInput: Shapes do not fit or a score is not finite.
    """
    outcomes = Outcomes(shared=shared)
    if item_groups is None:
        item_groups = np.arange(positives.num_items, dtype=np.int64)
    if query_groups is None:
        query_groups = item_groups[positives.items[positives.offsets[:-1]]]
    try:
        check_finite(scores)
        outcomes.rank("query_to_item", kind, scores, positives, query_groups)
        outcomes.rank("item_to_query", kind, scores.T, positives, item_groups[np.unique(positives.items)])
    except ValueError as error:
        raise InvalidInput(f"{kind} scores: {error}") from error
    return outcomes


def embedding_outcomes(
    scores: Floats, data: EvaluationSet, bootstrap: BootstrapSettings, shared: Positives | None = None
) -> Outcomes:
    """Rank a model's embedding scores (queries, items), with twins where the gallery has them."""
    outcomes = matrix_outcomes(
        scores,
        data.positives,
        "itc",
        item_groups=data.groups,
        # a caption is resampled with the clip it was written for, whatever else it is true of
        query_groups=data.groups[data.query_clip],
        shared=shared,
    )
    if len(data.twin_pairs):
        counts = outcomes.ranks["query_to_item"]["itc"][0]
        pairs = rank_scores(scores, pair_positives(data.positives, data.twin_of), checked=True)
        outcomes.twins["itc"] = twin_block(
            data, counts, pairs, lambda texts, videos: scores[texts, videos], bootstrap
        )
    return outcomes


def shared_positives(positives: Positives, labels: Sequence[str]) -> Positives | None:
    """Return the positives where equal captions share theirs, or None if that changes nothing."""
    shared = merge_duplicates(positives, labels)
    return shared if len(shared.items) > len(positives.items) else None


def twin_block(
    data: EvaluationSet,
    right: RankCounts,
    pair: RankCounts,
    score_of: Callable[[Ints, Ints], Floats],
    bootstrap: BootstrapSettings,
) -> dict[str, Any]:
    """Return the measures of a gallery of clips and reversed twins, over the queries that have a twin.

    Args:
        data: The gallery.
        right: Outcomes with the true clips as positives.
        pair: Outcomes with the twins of the true clips as positives too.
        score_of: (texts, videos) → scores of these pairs.
        bootstrap: How intervals are drawn.
    """
    paired = data.twin_of[data.query_clip] >= 0
    groups = data.groups[data.query_clip][paired]
    hit, pair_hit = right.recall(1)[paired], pair.recall(1)[paired]
    scores = twin_scores(score_of(*twin_grid(data)))
    pair_groups = data.groups[data.query_clip[data.twin_pairs[:, 0]]]
    by_pair = {
        "direction": scores.direction,
        "text": scores.text,
        "video": scores.video,
        "group": scores.group,
    }
    return {
        "recall@1": as_json(bootstrap.mean(hit, groups)),
        "pair_recall@1": as_json(bootstrap.mean(pair_hit, groups)),
        "direction|pair": as_json(bootstrap.ratio(hit, pair_hit, groups)),
        **{name: as_json(bootstrap.mean(values, pair_groups)) for name, values in by_pair.items()},
    }


def twin_chance(data: EvaluationSet) -> dict[str, Any]:
    """Return what guessing reaches in each measure of ``twin_block``."""
    paired = data.twin_of[data.query_clip] >= 0
    right = chance_counts(data.positives).recall(1)[paired].mean()
    pair = chance_counts(pair_positives(data.positives, data.twin_of)).recall(1)[paired].mean()
    values = {
        "recall@1": right,
        "pair_recall@1": pair,
        "direction|pair": right / pair,
        "direction": 1 / 2,
        "text": 1 / 4,
        "video": 1 / 4,
        "group": 1 / 6,
    }
    return {name: {"value": float(value)} for name, value in values.items()}


def twin_grid(data: EvaluationSet) -> tuple[Ints, Ints]:
    """Return (pairs, 2, 2) text and video numbers: caption i of a pair against clip j."""
    texts = data.twin_pairs
    videos = data.query_clip[texts]
    shape = (len(texts), 2, 2)
    return np.broadcast_to(texts[:, :, None], shape), np.broadcast_to(videos[:, None, :], shape)


def _ranks(
    direction: str, scores: NDArray[Any], positives: Positives, adjust: Adjustment | None
) -> RankCounts:
    if direction == "query_to_item":
        return rank_scores(scores, positives, checked=True, adjust=adjust)
    backward, kept = positives.reversed()
    return rank_scores(scores, backward, rows=kept, checked=True, adjust=adjust)


def _measures(
    ranks: dict[str, dict[str, Outcome]], recall_at: tuple[int, ...], bootstrap: BootstrapSettings
) -> dict[str, Any]:
    return {
        direction: {kind: measure(*outcome, recall_at, bootstrap) for kind, outcome in kinds.items()}
        for direction, kinds in ranks.items()
    }
