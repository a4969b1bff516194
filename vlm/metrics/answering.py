"""Accuracy of answers chosen among candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics.matrices import Floats


def choice_accuracy(scores: Sequence[ArrayLike], answers: Sequence[int]) -> Floats:
    """Return the probability that each question is answered right, ties broken at random; (questions,).

    Args:
        scores: The candidates' scores of each question; their number may vary.
        answers: The right candidate's position.

    Raises:
        ValueError: The lengths differ, a question has no candidates, an answer is out of range, or a
            score is not finite.
    """
    if len(scores) != len(answers) or not len(scores):
        raise ValueError(
            f"expected one answer a question and at least one, got {len(answers)} for {len(scores)}"
        )
    right = np.empty(len(scores))
    for question, (row, answer) in enumerate(zip(scores, answers, strict=True)):
        candidates = np.asarray(row, np.float64)
        if candidates.ndim != 1 or not 0 <= answer < len(candidates):
            raise ValueError(
                f"question {question}: expected an answer in 0..{candidates.size - 1}, got {answer}"
            )
        if not np.isfinite(candidates).all():
            raise ValueError(f"question {question}: candidate scores are not finite: {candidates.tolist()}")
        best = candidates == candidates.max()
        right[question] = best[answer] / best.sum()
    return right


def choice_chance(num_candidates: ArrayLike) -> float:
    """Return the accuracy of guessing: the mean of one over each question's number of candidates."""
    return float(np.mean(1.0 / np.asarray(num_candidates, np.float64)))
