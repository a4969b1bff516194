"""Is a confidence worth its number, and is it good for deciding which questions not to answer?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics.matrices import Floats, Ints


class Reliability(NamedTuple):
    """Questions by confidence; all are (bins,), zero where a bin is empty: how many, how sure, how right."""

    counts: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: ``sum over bins of share of questions * |accuracy - confidence|``.

        Source: Guo et al. 2017, On calibration of modern neural networks, section 2.
        """
        return float(np.sum(self.counts * np.abs(self.accuracy - self.confidence)) / self.counts.sum())


class RiskCoverage(NamedTuple):
    """Wrong answers among those given, when only the surest are given; both are (questions,).

    Attributes:
        coverage: Share of questions answered: 1/n, 2/n, ... 1.
        risk: Share of these that are wrong, ties in confidence broken at random.
    """

    coverage: Floats
    risk: Floats

    @property
    def area(self) -> float:
        """Mean risk over all coverages (AURC); that of a useless confidence is the error rate.

        Source: Geifman et al. 2019, Bias-reduced uncertainty estimation for deep neural classifiers.
        """
        return float(self.risk.mean())


def reliability(confidences: ArrayLike, right: ArrayLike, num_bins: int = 15) -> Reliability:
    """Return accuracy by confidence in bins of equal width over [0, 1].

    Args:
        confidences: How sure the model was of each answer; (questions,).
        right: Probability that the answer is right, mostly 0 or 1; (questions,).
        num_bins: Number of bins.

    Raises:
        ValueError: The lengths differ, there is no question, or a confidence is outside [0, 1].
    """
    sure, hits = _checked(confidences, right)
    if num_bins < 1:
        raise ValueError(f"expected at least 1 bin, got {num_bins}")
    bins = np.minimum((sure * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sums = (np.bincount(bins, weights=part, minlength=num_bins) for part in (sure, hits))
    return Reliability(counts, *(part / np.maximum(counts, 1) for part in sums))


def calibrated_error(confidences: ArrayLike, num_bins: int = 15, *, draws: int = 200, seed: int = 0) -> float:
    """Return the calibration error that chance alone gives: its mean if every confidence were true.

    With few questions a bin's accuracy strays from its confidence whatever the model; an error of this size
    is no fault.

    Raises:
        ValueError: As ``reliability``.
    """
    sure = _checked(confidences, confidences)[0]
    random = np.random.default_rng(seed)
    errors = [reliability(sure, random.random(len(sure)) < sure, num_bins).error for _ in range(draws)]
    return float(np.mean(errors))


def risk_coverage(confidences: ArrayLike, right: ArrayLike) -> RiskCoverage:
    """Return the risk at every coverage, from the surest answer to all of them.

    Args:
        confidences: How sure the model was of each answer, on any scale; (questions,).
        right: Probability that the answer is right, mostly 0 or 1; (questions,).

    Raises:
        ValueError: The lengths differ, there is no question, or a confidence is not finite.
    """
    sure, hits = _checked(confidences, right, bounded=False)
    _, group, sizes = np.unique(-sure, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=1.0 - hits) / sizes
    answered = np.arange(1, len(sure) + 1)
    # within a group of equal confidence every question is as likely to come first
    risk = np.cumsum(np.repeat(wrong, sizes)) / answered
    return RiskCoverage(answered / len(sure), risk)


def _checked(confidences: ArrayLike, right: ArrayLike, bounded: bool = True) -> tuple[Floats, Floats]:
    sure, hits = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    if sure.ndim != 1 or not sure.size or sure.shape != hits.shape:
        raise ValueError(
            f"expected one confidence a question and at least one, got {sure.shape} and {hits.shape}"
        )
    wrong = ~np.isfinite(sure) | (bounded & ((sure < 0) | (sure > 1)))
    if wrong.any():
        first = int(np.argmax(wrong))
        kind = "a confidence in [0, 1]" if bounded else "a finite confidence"
        raise ValueError(f"question {first}: expected {kind}, got {sure[first]}")
    return sure, hits
