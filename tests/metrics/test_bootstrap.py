"""Intervals cover the truth as often as they say, by video, and differences are paired."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.metrics import (
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_median,
    bootstrap_ratio,
    paired_difference,
)


def test_value_is_the_plain_mean_and_repeats_are_equal():
    values, groups = [0, 1, 1, 0.5], [3, 3, 9, 1]
    first = bootstrap_mean(values, groups, seed=5)
    assert first.value == pytest.approx(0.625)
    assert first.low <= first.value <= first.high
    many = np.random.default_rng(0).random(50)
    drawn = bootstrap_mean(many, np.arange(50), seed=5)
    assert drawn == bootstrap_mean(many, np.arange(50), seed=5)
    assert drawn != bootstrap_mean(many, np.arange(50), seed=6)


def test_labels_of_groups_do_not_matter():
    random = np.random.default_rng(0)
    values, groups = random.random(60), random.integers(0, 20, 60)
    assert bootstrap_mean(values, groups) == bootstrap_mean(values, groups * 1000 - 7)


def test_width_is_that_of_the_binomial_law():
    values = (np.arange(1000) < 356).astype(float)
    interval = bootstrap_mean(values, np.arange(1000), resamples=4000)
    half = 1.96 * np.sqrt(0.356 * 0.644 / 1000)
    assert interval.low == pytest.approx(0.356 - half, abs=0.004)
    assert interval.high == pytest.approx(0.356 + half, abs=0.004)


def test_captions_of_one_video_are_not_independent_trials():
    video_level = (np.arange(100) < 40).astype(float)
    alone = bootstrap_mean(video_level, np.arange(100))
    repeated, owner = np.repeat(video_level, 20), np.repeat(np.arange(100), 20)
    by_video = bootstrap_mean(repeated, owner)
    assert (by_video.low, by_video.high) == pytest.approx((alone.low, alone.high))
    by_caption = bootstrap_mean(repeated, np.arange(2000))
    assert by_caption.high - by_caption.low < (by_video.high - by_video.low) / 3


@pytest.mark.parametrize("statistic", [bootstrap_mean, bootstrap_median])
def test_coverage(statistic):
    random = np.random.default_rng(1)
    truth = 0.3 if statistic is bootstrap_mean else 40.0
    covered = 0
    for trial in range(300):
        # the median of 1..79 is 40
        values = (random.random(200) < truth) if truth < 1 else random.integers(1, 80, 201)
        _, low, high = statistic(values.astype(float), np.arange(len(values)), resamples=300, seed=trial)
        covered += low <= truth <= high
    # 95 % of 300 is 285 +- 3.8; resampling is a little short at this size, never by much
    assert 270 <= covered <= 297


def test_all_hits_is_no_certainty():
    interval = bootstrap_mean(np.ones(200), np.arange(200))
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 200))
    none = bootstrap_mean(np.zeros(40), np.repeat(np.arange(20), 2))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))  # twenty videos, however many captions
    ranks = bootstrap_mean(np.ones(50), np.arange(50), bounds=False)
    assert (ranks.low, ranks.high) == (1.0, 1.0)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_median_is_numpys(size):
    values = np.random.default_rng(size).permutation(size) * 3.0
    interval = bootstrap_median(values, np.arange(size))
    assert interval.value == np.median(values)
    assert values.min() <= interval.low <= interval.value <= interval.high <= values.max()


def test_medians_of_resamples_are_numpys(monkeypatch):
    from vlm.metrics import bootstrap

    values, groups = np.array([5.0, 1.0, 4.0, 2.0, 9.0]), np.array([0, 0, 1, 2, 2])
    draws = np.array([[2.0, 0, 1], [0, 3, 0], [1, 1, 1]])
    monkeypatch.setattr(bootstrap, "_weights", lambda *_, **__: iter([draws]))
    seen = {}
    monkeypatch.setattr(bootstrap, "_percentiles", lambda samples: seen.update(samples=samples) or (0.0, 0.0))
    bootstrap_median(values, groups)
    expected = [np.median(np.repeat(values, row[groups].astype(int))) for row in draws]
    assert seen["samples"].tolist() == expected


def test_ratio_of_conditional_rates():
    hits, pairs = np.array([1.0, 0, 0.5, 0]), np.array([1.0, 1, 0.5, 0])
    interval = bootstrap_ratio(hits, pairs, np.arange(4))
    assert interval.value == pytest.approx(0.6)
    assert 0 <= interval.low <= 0.6 <= interval.high <= 1
    assert bootstrap_ratio(np.zeros(3), np.zeros(3), np.arange(3)) is None


def test_paired_difference_sees_what_two_intervals_hide():
    random = np.random.default_rng(2)
    hard = random.random(500)
    first, second = (hard < 0.40).astype(float), (hard < 0.43).astype(float)
    difference = paired_difference(first, second, np.arange(500))
    assert difference.value == pytest.approx(second.mean() - first.mean())
    assert difference.low > 0
    apart = bootstrap_mean(first, np.arange(500)), bootstrap_mean(second, np.arange(500))
    assert apart[0].high > apart[1].low
    assert paired_difference(first, first, np.arange(500)) == (0, 0, 0)
    reverse = paired_difference(second, first, np.arange(500))
    assert reverse.value == -difference.value


def test_blocks_hold_all_resamples_and_full_samples(monkeypatch):
    from vlm.metrics import bootstrap

    monkeypatch.setattr(bootstrap, "_BLOCK_BYTES", 8 * 10 * 3)
    weights = np.concatenate(list(bootstrap._weights(10, 20, 0)))
    assert weights.shape == (20, 10)
    assert (weights.sum(axis=1) == 10).all()


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [([], [], "at least one"), ([1.0], [1, 2], "one group"), ([np.nan, 1], [0, 1], "1 of 2 values")],
)
def test_wrong_input_is_refused(values, groups, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, groups)
    with pytest.raises(ValueError, match="same queries|at least one|one group|values"):
        paired_difference(values, [0.0, 0.0, 0.0], groups)


def test_the_mean_over_classes_weighs_them_alike_and_stays_a_probability():
    hits, classes = [1, 1, 0, 1], [7, 7, 7, 2]
    found = bootstrap_class_mean(hits, classes, range(4))
    assert found.value == pytest.approx((2 / 3 + 1) / 2)
    assert 0 <= found.low <= found.value <= found.high <= 1
    # one class is the plain mean, drawn alike
    random = np.random.default_rng(2)
    values, groups = random.random(80), random.integers(0, 30, 80)
    plain, single = (
        bootstrap_mean(values, groups, seed=3),
        bootstrap_class_mean(values, [5] * 80, groups, seed=3),
    )
    assert tuple(single) == pytest.approx(tuple(plain))


def test_the_interval_over_classes_is_as_wide_as_the_formula_says():
    random = np.random.default_rng(4)
    classes = np.repeat([0, 1], [400, 100])
    hits = (random.random(500) < np.where(classes == 0, 0.9, 0.5)).astype(float)
    found = bootstrap_class_mean(hits, classes, np.arange(500), resamples=4000)
    shares = [hits[classes == kind].mean() for kind in (0, 1)]
    variance = sum(share * (1 - share) / size for share, size in zip(shares, (400, 100), strict=True)) / 4
    assert found.high - found.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.08)


def test_a_clip_and_its_twin_count_once_for_the_mean_over_classes():
    hits = np.tile([1.0, 0.0, 1.0, 1.0], 10)
    alone = bootstrap_class_mean(np.repeat(hits, 2), [0, 1] * 40, np.arange(80))
    together = bootstrap_class_mean(np.repeat(hits, 2), [0, 1] * 40, np.repeat(np.arange(40), 2))
    assert together.high - together.low > 1.2 * (alone.high - alone.low)


def test_several_measures_are_drawn_once_and_alike():
    random = np.random.default_rng(9)
    values = {"a": random.random(70), "b": np.ones(70), "c": 9 * random.random(70), "d": np.ones(70)}
    groups = random.integers(0, 25, 70)
    found = bootstrap_means(values, groups, seed=4, unbounded=("c", "d"))
    for name, entry in values.items():
        alone = bootstrap_mean(entry, groups, seed=4, bounds=name not in "cd")
        assert tuple(found[name]) == pytest.approx(tuple(alone))
    assert (found["b"].low < 1, found["d"].low) == (True, 1.0)
    with pytest.raises(ValueError, match="one group a value"):
        bootstrap_means({"a": values["a"], "b": [1.0]}, groups)


def test_no_certainty_from_a_few_groups():
    """All of ten right, all of three right given a condition, or one video half right: none is certain."""
    limit = 0.025 ** (1 / 3)
    held = bootstrap_ratio(np.ones(3), np.ones(3), np.arange(3))
    assert (held.value, held.low, held.high) == (1.0, pytest.approx(limit), 1.0)
    # the condition holds in two groups of four; the others say nothing of the rate
    never = bootstrap_ratio(np.zeros(4), np.array([1.0, 1, 0, 0]), np.arange(4))
    assert (never.low, never.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 2)))
    whole = bootstrap_class_mean(np.ones(10), [0, 1] * 5, np.arange(10))
    assert (whole.low, whole.high) == (pytest.approx(0.025 ** (1 / 10)), 1.0)
    alone = bootstrap_mean([1.0, 0.0], [7, 7])
    assert (alone.value, alone.low, alone.high) == (0.5, 0.0, 1.0)
    ranks = bootstrap_mean([1.0, 4.0], [7, 7], bounds=False)
    assert (ranks.low, ranks.high) == (2.5, 2.5)  # of what has no bounds nothing better can be said
