"""Calibration and abstention against plain loops, every tie order, and what chance alone gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlm.metrics import calibrated_error, reliability, risk_coverage


def test_bins_by_hand():
    table = reliability([0.05, 0.15, 0.15, 0.95, 1.0], [0, 1, 0, 1, 1], num_bins=10)
    assert table.counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert table.confidence[[0, 1, 9]] == pytest.approx([0.05, 0.15, 0.975])
    assert table.accuracy[[0, 1, 9]] == pytest.approx([0, 0.5, 1])
    assert table.error == pytest.approx((1 * 0.05 + 2 * 0.35 + 2 * 0.025) / 5)


def test_error_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    sure, right = random.random(500), (random.random(500) < 0.6).astype(float)
    total = 0.0
    for number in range(15):
        inside = (sure >= number / 15) & (sure < (number + 1) / 15)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - sure[inside].mean()) / 500
    assert reliability(sure, right).error == pytest.approx(total)


def test_overconfidence_is_its_size_and_chance_is_no_fault():
    random = np.random.default_rng(1)
    sure = random.uniform(0.6, 0.9, 20000)
    honest, bold = random.random(20000) < sure, random.random(20000) < sure - 0.2
    floor = calibrated_error(sure)
    assert reliability(sure, honest).error == pytest.approx(floor, abs=0.005)
    assert reliability(sure, bold).error == pytest.approx(0.2, abs=0.01)


def test_what_perfect_calibration_measures():
    """About 2.3 points of error at 1,000 questions and 0.7 at 10,000, for a model that is mostly sure."""
    random = np.random.default_rng(2)
    errors = {
        n: [calibrated_error(random.uniform(0.6, 1, n), draws=50) for _ in range(3)] for n in (1000, 10000)
    }
    assert np.mean(errors[1000]) == pytest.approx(0.023, abs=0.005)
    assert np.mean(errors[10000]) == pytest.approx(0.007, abs=0.0015)
    assert calibrated_error([0.0, 1.0, 1.0]) == 0.0  # certainty leaves no room for chance


def test_risk_is_the_mean_over_all_orders_of_equal_confidence():
    sure, right = [0.9, 0.5, 0.5, 0.5, 0.2], [1, 0, 1, 1, 0]
    risks = []
    for order in itertools.permutations(range(5)):
        if all(sure[a] >= sure[b] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum([1 - right[question] for question in order])
            risks.append(wrong / np.arange(1, 6))
    found = risk_coverage(sure, right)
    assert found.risk == pytest.approx(np.mean(risks, axis=0))
    assert found.coverage == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found.area == pytest.approx(np.mean(risks))


def test_a_good_order_answers_safely_and_none_is_the_error_rate():
    random = np.random.default_rng(3)
    right = (random.random(1000) < 0.7).astype(float)
    flat = risk_coverage(np.full(1000, 0.5), right)
    assert flat.risk == pytest.approx(np.full(1000, 1 - right.mean()))
    oracle = risk_coverage(right, right)
    assert oracle.risk[: int(right.sum())].max() == 0.0
    assert oracle.area < 0.06 < flat.area
    assert oracle.risk[-1] == pytest.approx(flat.risk[-1])
    assert risk_coverage(-right, right).area > flat.area


@pytest.mark.parametrize(
    ("confidences", "right", "message"),
    [
        ([], [], "at least one"), ([0.5], [1, 0], "one confidence a question"),
        ([0.5, 1.5], [1, 0], "question 1"),
        ([-0.1], [1], "question 0"), ([0.1, np.nan], [1, 1], "question 1: expected a confidence in"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(confidences, right, message):
    with pytest.raises(ValueError, match=message):
        reliability(confidences, right)
    with pytest.raises(ValueError, match="at least 1 bin"):
        reliability([0.5], [1], num_bins=0)
    with pytest.raises(ValueError, match="question 0: expected a finite confidence"):
        risk_coverage([np.inf], [1])
