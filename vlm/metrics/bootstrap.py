"""Intervals by resampling whole videos, and differences between two models on the same videos.

The captions of one video stand or fall together; resampling them one by one would call twenty captions
twenty independent trials and give intervals that are far too narrow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics.matrices import Floats, Ints

_BLOCK_BYTES = 64 * 2**20
_LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(
    values: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0, bounds: bool = True
) -> Interval:
    """Return the mean of ``values`` with its percentile interval over resampled groups.

    Where every value is 0 or every value is 1, resampling cannot leave that value; the open end is then the
    exact binomial limit for that many groups ("rule of three"), not a false certainty. A single group says
    nothing of how groups vary: of a probability strictly between 0 and 1 its interval is [0, 1].

    Args:
        values: One outcome a query; (queries,).
        groups: The video that each outcome belongs to, any integer labels; (queries,).
        resamples: Number of bootstrap samples.
        seed: Of the resampling; two calls with the same groups and seed draw the same samples.
        bounds: The values are probabilities, to which the binomial limit applies.

    Raises:
        ValueError: There is no value, a value is not finite, or the lengths differ.
    """
    named = bootstrap_means(
        {"": values}, groups, resamples=resamples, seed=seed, unbounded=() if bounds else ("",)
    )
    return named[""]


def bootstrap_means(
    values: Mapping[str, ArrayLike],
    groups: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    unbounded: Collection[str] = (),
) -> dict[str, Interval]:
    """Return ``bootstrap_mean`` of several measures of the same queries, drawn once for all.

    Args:
        values: Name → one outcome a query; (queries,).
        groups: As ``bootstrap_mean``.
        resamples: Number of bootstrap samples.
        seed: Of the resampling.
        unbounded: Names of the measures that are not probabilities.

    Raises:
        ValueError: As ``bootstrap_mean``.
    """
    labels = _checked(next(iter(values.values())), groups)[1]
    num_groups = int(labels.max()) + 1
    outcomes = [_checked(entry, groups)[0] for entry in values.values()]
    tops = np.stack([np.bincount(labels, weights=entry, minlength=num_groups) for entry in outcomes], axis=1)
    sizes = np.bincount(labels, minlength=num_groups).astype(np.float64)
    samples = np.concatenate(
        [weights @ tops / (weights @ sizes)[:, None] for weights in _weights(num_groups, resamples, seed)]
    )
    intervals = {}
    for column, name in enumerate(values):
        value = float(tops[:, column].sum() / sizes.sum())
        interval = Interval(value, *_percentiles(samples[:, column]))
        intervals[name] = interval if name in unbounded else _widened(interval, num_groups)
    return intervals


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """Return ``sum(numerators) / sum(denominators)`` with its interval; None if the denominator is zero.

    For conditional rates, such as "the right direction, given the right pair". Samples in which the
    condition never holds are left out. Of a rate of 0 or 1 the open end is the binomial limit for the groups
    in which the condition holds, as in ``bootstrap_mean``.

    Raises:
        ValueError: As ``bootstrap_mean``.
    """
    if not np.sum(denominators):
        return None
    top, labels = _checked(numerators, groups)
    bottom, _ = _checked(denominators, groups)
    num_groups = int(labels.max()) + 1
    tops, bottoms = (np.bincount(labels, weights=part, minlength=num_groups) for part in (top, bottom))
    samples = []
    for weights in _weights(num_groups, resamples, seed):
        below = weights @ bottoms
        samples.append((weights @ tops)[below > 0] / below[below > 0])
    interval = Interval(float(top.sum() / bottom.sum()), *_percentiles(np.concatenate(samples)))
    return _widened(interval, int(np.count_nonzero(bottoms)))


def bootstrap_class_mean(
    values: ArrayLike, classes: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean over classes of the mean of each one's ``values``, with its interval over groups.

    A class that a sample does not hold is left out of that sample's mean. Of a mean of 0 or 1 the open end is
    the binomial limit for that many groups, as in ``bootstrap_mean``.

    Args:
        values: One outcome a video; (videos,).
        classes: Which class each is of, any integer labels; (videos,).
        groups: What is resampled together, any integer labels; (videos,).
        resamples: Number of bootstrap samples.
        seed: Of the resampling.

    Raises:
        ValueError: As ``bootstrap_mean``.
    """
    outcomes, owners = _checked(values, groups)
    _, kinds = _checked(values, classes)
    shape = int(owners.max()) + 1, int(kinds.max()) + 1
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (owners, kinds), outcomes)
    np.add.at(counts, (owners, kinds), 1.0)
    means = []
    for weights in _weights(shape[0], resamples, seed):
        below = weights @ counts
        held = below > 0
        ratios = np.divide(weights @ sums, below, out=np.zeros_like(below), where=held)
        means.append(ratios.sum(axis=1) / held.sum(axis=1))
    value = float((sums.sum(axis=0) / counts.sum(axis=0)).mean())
    return _widened(Interval(value, *_percentiles(np.concatenate(means))), shape[0])


def bootstrap_median(
    values: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the median of ``values`` with its percentile interval over resampled groups.

    Raises:
        ValueError: As ``bootstrap_mean``.
    """
    outcomes, labels = _checked(values, groups)
    order = np.argsort(outcomes)
    ascending, owners = outcomes[order], labels[order]
    medians = []
    for weights in _weights(int(labels.max()) + 1, resamples, seed, extra_width=len(outcomes)):
        reached = np.cumsum(weights[:, owners], axis=1)
        total = reached[:, -1:]
        # the mean of the two middle ones when the number is even, as np.median
        lower = np.argmax(reached >= (total + 1) // 2, axis=1)
        upper = np.argmax(reached >= total // 2 + 1, axis=1)
        medians.append((ascending[lower] + ascending[upper]) / 2)
    return Interval(float(np.median(outcomes)), *_percentiles(np.concatenate(medians)))


def paired_difference(
    first: ArrayLike, second: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean of ``second - first``, query by query, with its interval over resampled groups.

    Raises:
        ValueError: As ``bootstrap_mean``, or the two differ in length.
    """
    left, right = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if left.shape != right.shape:
        raise ValueError(f"expected the same queries on both sides, got {left.shape} and {right.shape}")
    return bootstrap_mean(right - left, groups, resamples=resamples, seed=seed, bounds=False)


def _checked(values: ArrayLike, groups: ArrayLike) -> tuple[Floats, Ints]:
    outcomes = np.asarray(values, np.float64)
    if outcomes.ndim != 1 or not outcomes.size or outcomes.shape != np.shape(groups):
        raise ValueError(
            f"expected one group a value and at least one value, got {outcomes.shape} and {np.shape(groups)}"
        )
    if not np.isfinite(outcomes).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(outcomes))} of {outcomes.size} values are not finite"
        )
    return outcomes, np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def _weights(num_groups: int, resamples: int, seed: int, extra_width: int = 0) -> Iterator[Floats]:
    """Yield how often each group was drawn: (samples, groups) blocks that together hold all resamples."""
    random = np.random.default_rng(seed)
    step = max(1, min(resamples, _BLOCK_BYTES // (8 * (num_groups + extra_width))))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = random.integers(num_groups, size=(count, num_groups), dtype=np.int32)
        flat = drawn + np.arange(count, dtype=np.int64)[:, None] * num_groups
        drawn_counts = np.bincount(flat.ravel(), minlength=count * num_groups)
        yield drawn_counts.reshape(count, num_groups).astype(np.float64)


def _widened(interval: Interval, num_groups: int) -> Interval:
    """Return the interval of a probability, opened where resampling could not but give one value."""
    value, low, high = interval
    if low != high:
        return interval
    limit = float(((1 - _LEVEL) / 2) ** (1 / num_groups))
    if value == 0.0:
        return Interval(value, 0.0, 1 - limit)
    if value == 1.0:
        return Interval(value, limit, 1.0)
    return Interval(value, 0.0, 1.0) if num_groups == 1 else interval


def _percentiles(samples: Floats) -> tuple[float, float]:
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)
