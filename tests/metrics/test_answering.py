"""Accuracy of choices by hand and under ties."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.metrics import choice_accuracy, choice_chance


def test_by_hand():
    right = choice_accuracy([[1, 3, 2], [0.5, 0.5], [2, 2, 2, 1], [7]], [1, 0, 3, 0])
    assert right.tolist() == [1, 0.5, 0, 1]
    assert choice_accuracy([[1, 1, 1]], [2])[0] == pytest.approx(1 / 3)


def test_a_collapsed_model_is_at_chance():
    sizes = np.random.default_rng(0).integers(2, 6, 100)
    right = choice_accuracy([np.zeros(size) for size in sizes], [int(size) - 1 for size in sizes])
    assert right.mean() == pytest.approx(choice_chance(sizes))


@pytest.mark.parametrize(
    ("scores", "answers", "message"),
    [
        ([[1, 2]], [2], "question 0: expected an answer in 0..1, got 2"),
        ([[1, 2]], [-1], "question 0"),
        ([[1], []], [0, 0], "question 1"),
        ([[1, np.nan]], [0], "question 0: candidate scores are not finite"),
        ([[1, 2]], [0, 1], "got 2 for 1"),
        ([], [], "at least one"),
    ],
)
def test_wrong_input_is_refused(scores, answers, message):
    with pytest.raises(ValueError, match=message):
        choice_accuracy(scores, answers)
