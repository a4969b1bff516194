"""Moments that were found for a query: overlap in time, precision of ranked windows, highlights.

Source: Lei et al. 2021, QVHighlights (section 5 and the evaluation released with it), whose interpolated
precision is that of the PASCAL VOC 2011 development kit, as ActivityNet's detection task uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.metrics.matrices import Floats

MEAN_IOUS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def overlaps(first: ArrayLike, second: ArrayLike) -> Floats:
    """Return the intersection over union of every window with every other, (n, m) float64 in [0, 1].

    A window that is empty or ends before it begins overlaps nothing.

    Args:
        first: (n, 2) or more columns, of which the first two are start and end in seconds.
        second: (m, 2), likewise.
    """
    left, right = _windows(first), _windows(second)
    shared = np.minimum(left[:, None, 1], right[None, :, 1]) - np.maximum(left[:, None, 0], right[None, :, 0])
    lengths = np.diff(left[:, :2])[:, :1] + np.diff(right[:, :2])[:, 0]
    union = lengths - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0))


def window_precision(windows: ArrayLike, truths: ArrayLike, ious: Sequence[float]) -> Floats:
    """Return the average precision of ranked windows of one query at each of ``ious``, (ious,) float64.

    From the best window down, each takes the true one that it overlaps most among those not yet taken and
    overlapped by at least the threshold; a window that finds none is wrong. Precision is interpolated: at a
    recall it is the highest of this and all greater recalls.

    Args:
        windows: (n, 2) or more columns, best first; none gives 0.
        truths: (m, 2), at least one.
        ious: Thresholds above 0 and at most 1.

    Raises:
        ValueError: There is no true window, or a threshold is out of range.
    """
    levels = np.asarray(ious, np.float64)
    shares = overlaps(windows, truths)
    num_windows, num_truths = shares.shape
    if not num_truths or levels.min() <= 0 or levels.max() > 1:
        raise ValueError(
            f"expected a true window and thresholds in (0, 1], got {num_truths} and {list(ious)}"
        )
    every = np.arange(len(levels))
    hits = np.zeros((len(levels), num_windows))
    is_free = np.ones((len(levels), num_truths), bool)
    for place, row in enumerate(shares):
        usable = np.where(is_free & (row >= levels[:, None]), row, -1.0)
        best = usable.argmax(axis=1)
        found = usable[every, best] >= 0
        hits[found, place] = 1
        is_free[every[found], best[found]] = False
    precision = hits.cumsum(axis=1) / np.arange(1, num_windows + 1)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means: Floats = (highest * hits).sum(axis=1) / num_truths
    return means


def moment_measures(
    windows: Sequence[ArrayLike],
    truths: Sequence[ArrayLike],
    *,
    recall_at: Sequence[int] = (1, 5),
    ious: Sequence[float] = (0.3, 0.5, 0.7),
    mean_at: Sequence[float] = (0.5, 0.75),
) -> dict[str, Floats]:
    """Return every measure of every query, each (queries,) in [0, 1].

    ``recall@k@t``: whether one of the first k windows overlaps some true window by at least t. ``miou``: the
    largest overlap of the first window with a true one. ``map@t``: `window_precision` at t; ``map``: its mean
    over 0.5, 0.55, ..., 0.95.

    Args:
        windows: Of each query, best first, (n, 2) or more columns; a query may have none.
        truths: Of each query, (m, 2), at least one.
        recall_at: The k.
        ious: The t of recall.
        mean_at: The t of precision.

    Raises:
        ValueError: The lengths differ, or as ``window_precision``.
    """
    if len(windows) != len(truths):
        raise ValueError(f"expected windows for each of {len(truths)} queries, got {len(windows)}")
    levels = (*MEAN_IOUS, *mean_at)
    precisions = np.asarray(
        [window_precision(*pair, levels) for pair in zip(windows, truths, strict=True)]
    ).reshape(-1, len(levels))
    largest = {k: _largest_overlaps(windows, truths, k) for k in {1, *recall_at}}
    measures: dict[str, Floats] = {
        f"recall@{k}@{level:g}": (largest[k] >= level).astype(np.float64) for k in recall_at for level in ious
    }
    measures["miou"] = largest[1]
    measures["map"] = precisions[:, : len(MEAN_IOUS)].mean(axis=1)
    places = enumerate(mean_at, start=len(MEAN_IOUS))
    return measures | {f"map@{level:g}": precisions[:, place] for place, level in places}


def highlight_precision(scores: ArrayLike, is_highlight: ArrayLike) -> float:
    """Return the average precision of the clips of one video, ranked by score; 0 if none is a highlight.

    The mean, over the scores at which recall rises, of the interpolated precision. Clips of equal score count
    as one step, as in the released evaluation.

    Args:
        scores: (clips,), finite; more is better.
        is_highlight: (clips,) truth values.
    """
    values, right = np.asarray(scores, np.float64), np.asarray(is_highlight, bool)
    if not right.any():
        return 0.0
    order = np.argsort(-values, kind="stable")
    is_last = np.append(np.diff(values[order]) != 0, True)
    found = np.cumsum(right[order])[is_last]
    precision = found / (np.flatnonzero(is_last) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float(highest[np.diff(found, prepend=0) > 0].mean())


def highlight_measures(
    scores: Sequence[ArrayLike], ratings: Sequence[ArrayLike], lowest: float
) -> dict[str, Floats]:
    """Return ``map`` and ``hit@1`` of every query, each (queries,) in [0, 1].

    ``map`` is the mean over people of `highlight_precision`; ``hit@1`` is whether anyone calls the clip with
    the highest score a highlight, or the share of these clips of which that is true if several have it.

    Args:
        scores: Of each query, (clips,).
        ratings: Of each query, (clips, people): how well each person found that a clip fits.
        lowest: From this rating on a clip is a highlight.

    Raises:
        ValueError: A query has another number of scores than of rated clips, or none.
    """
    precisions, hits = [], []
    for values, rated in zip(scores, ratings, strict=True):
        given = np.asarray(values, np.float64)
        is_highlight: NDArray[np.bool_] = np.asarray(np.asarray(rated, np.float64) >= lowest)
        if is_highlight.ndim != 2 or given.shape != is_highlight.shape[:1] or not len(given):
            raise ValueError(f"expected a score for each rated clip, got {given.shape}, {is_highlight.shape}")
        precisions.append(np.mean([highlight_precision(given, column) for column in is_highlight.T]))
        is_anyones = np.asarray(is_highlight.any(axis=1))
        hits.append(is_anyones[given == given.max()].mean())
    return {"map": np.asarray(precisions, np.float64), "hit@1": np.asarray(hits, np.float64)}


def _largest_overlaps(windows: Sequence[ArrayLike], truths: Sequence[ArrayLike], k: int) -> Floats:
    pairs = zip(windows, truths, strict=True)
    return np.asarray([overlaps(_windows(own)[:k], true).max(initial=0.0) for own, true in pairs])


def _windows(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    return array.reshape(0, 2) if not array.size else array
