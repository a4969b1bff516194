"""The figures of a card on moments: recall and precision, by length of the true windows, and highlights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.errors import InvalidInput
from vlm.evaluation.card import as_json
from vlm.evaluation.moments.data import MomentSet
from vlm.evaluation.protocol import BootstrapSettings, Protocol
from vlm.metrics import bootstrap_means, highlight_measures, moment_measures
from vlm.metrics.matrices import Floats, Ints

# the lowest rating of a highlight, under the names of the released evaluation
_RATINGS = {"fair": 2.0, "good": 3.0, "very good": 4.0}


def measure_windows(
    windows: Sequence[Floats], data: MomentSet, protocol: Protocol, truths: Sequence[Floats] | None = None
) -> dict[str, Floats]:
    """Return every measure of every query, see ``vlm.metrics.moment_measures``.

    Args:
        windows: Of each query (n, 3), best first.
        data: The queries.
        protocol: Which measures, and how many windows count.
        truths: Instead of the true windows of all queries.
    """
    settings = protocol.moments
    assert settings is not None
    return moment_measures(
        [rows[: settings.max_windows] for rows in windows],
        data.truths if truths is None else truths,
        recall_at=protocol.recall_at,
        ious=settings.ious,
        mean_at=settings.mean_at,
    )


def with_intervals(
    values: Mapping[str, Floats], groups: Ints, bootstrap: BootstrapSettings
) -> dict[str, Any]:
    """Return the mean of each measure with its interval over resampled videos."""
    means = bootstrap_means(values, groups, resamples=bootstrap.resamples, seed=bootstrap.seed)
    return {name: as_json(interval) for name, interval in means.items()}


def by_length(windows: Sequence[Floats], data: MomentSet, protocol: Protocol) -> dict[str, Any]:
    """Return the measures by length of the true windows.

    A query counts in each group of which it has windows, and only these are looked for; so the released
    evaluation of QVHighlights splits them.
    """
    assert protocol.moments is not None
    short, middle = protocol.moments.lengths
    table: dict[str, Any] = {}
    for name, low, high in (("short", 0.0, short), ("middle", short, middle), ("long", middle, np.inf)):
        kept = [truth[_is_between(truth, low, high)] for truth in data.truths]
        asked = [query for query, truth in enumerate(kept) if len(truth)]
        table[name] = {"num_queries": len(asked)}
        if asked:
            values = measure_windows(
                [windows[query] for query in asked], data, protocol, [kept[query] for query in asked]
            )
            table[name] |= with_intervals(values, data.query_video[asked], protocol.bootstrap)
    return table


def rated_queries(data: MomentSet) -> list[int]:
    """Return the numbers of the queries of which people rated clips."""
    return [query for query, table in enumerate(data.ratings) if table is not None]


def fit_saliency(saliency: Sequence[Floats | None], data: MomentSet) -> list[Floats]:
    """Return a score for each rated clip of each rated query.

    A last clip that has none counts as 0 and one that is too many is left out, as in the released evaluation.

    Raises:
        InvalidInput: A rated query, which is named, has no scores, or those of another number of clips.
    """
    fitted: list[Floats] = []
    for query in rated_queries(data):
        scores, table = saliency[query], data.ratings[query]
        assert table is not None
        if scores is None or abs(len(scores) - len(table)) > 1:
            raise InvalidInput(
                f"query {data.query_ids[query]!r}: expected a saliency score for each of {len(table)} clips, "
                f"got {'none' if scores is None else len(scores)}"
            )
        row = np.zeros(len(table))
        row[: len(scores)] = scores[: len(table)]
        fitted.append(row)
    return fitted


def measure_highlights(scores: Sequence[Floats], data: MomentSet) -> dict[str, dict[str, Floats]]:
    """Return for each lowest rating ``map`` and ``hit@1`` of every rated query; 2 is fair, 4 very good."""
    ratings = [table for table in data.ratings if table is not None]
    return {name: highlight_measures(scores, ratings, lowest) for name, lowest in _RATINGS.items()}


def _is_between(truth: Floats, low: float, high: float) -> NDArray[np.bool_]:
    lengths = truth[:, 1] - truth[:, 0]
    return np.asarray((lengths > low) & (lengths <= high))
