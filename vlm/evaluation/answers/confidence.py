"""A card's sections on confidence: is it calibrated, and does it say which questions not to answer?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics import calibrated_error, reliability, risk_coverage

NUM_BINS = 15
_COVERAGES = tuple(number / 10 for number in range(1, 11))


def calibration_section(confidences: ArrayLike, right: ArrayLike) -> dict[str, Any]:
    """Return the expected calibration error beside what chance alone gives, and the bins that are not empty.

    Args:
        confidences: In [0, 1]; (questions,).
        right: Probability that each answer is right; (questions,).

    Raises:
        ValueError: As ``vlm.metrics.reliability``.
    """
    table = reliability(confidences, right, NUM_BINS)
    bins = [
        {
            "low": number / NUM_BINS,
            "high": (number + 1) / NUM_BINS,
            "num_questions": int(count),
            "confidence": float(confidence),
            "accuracy": float(accuracy),
        }
        for number, (count, confidence, accuracy) in enumerate(zip(*table, strict=True))
        if count
    ]
    return {
        "ece": {"value": table.error},
        "ece_if_calibrated": {"value": calibrated_error(confidences, NUM_BINS)},
        "num_bins": NUM_BINS,
        "bins": bins,
    }


def abstention_section(confidences: ArrayLike, right: ArrayLike) -> dict[str, Any]:
    """Return the risk at ten coverages and the area under that curve, beside the worst and best use of it.

    Args:
        confidences: On any scale; (questions,).
        right: Probability that each answer is right; (questions,).

    Raises:
        ValueError: As ``vlm.metrics.risk_coverage``.
    """
    curve, hits = risk_coverage(confidences, right), np.asarray(right, np.float64)
    places = [max(0, round(coverage * len(hits)) - 1) for coverage in _COVERAGES]
    return {
        "aurc": {"value": curve.area},
        "aurc_unordered": {"value": float(1 - hits.mean())},
        "aurc_best": {"value": risk_coverage(hits, hits).area},
        "curve": [
            {"coverage": float(curve.coverage[place]), "risk": float(curve.risk[place])} for place in places
        ],
    }
