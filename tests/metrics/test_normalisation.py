"""Hub corrections against plain loops, one query at a time, and on synthetic hubs with known outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.metrics import Positives, bank_softmax, dual_softmax, matrices, rank_scores

ROWS = np.arange(3)


def _softmax_over_queries(scores, scale):
    powers = np.exp(scale * scores)
    return powers / powers.sum(axis=0, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_dual_softmax_is_the_published_product(scale, monkeypatch):
    scores = np.random.default_rng(0).standard_normal((9, 5))
    expected = scores * _softmax_over_queries(scores, scale)
    assert dual_softmax(scores, scale)(scores, ROWS) == pytest.approx(expected)
    monkeypatch.setattr(matrices, "BLOCK_BYTES", 8 * 5 * 2)  # two rows a block
    assert dual_softmax(scores, scale)(scores[2:4], ROWS) == pytest.approx(expected[2:4])


def test_bank_orders_as_the_inverted_softmax():
    random = np.random.default_rng(1)
    scores, bank = random.standard_normal((40, 6)), random.standard_normal((30, 6))
    adjusted = bank_softmax(bank, 5.0)(scores, ROWS)
    inverted = np.exp(5.0 * scores) / np.exp(5.0 * bank).sum(axis=0)
    known = set(bank.argmax(axis=1).tolist())
    for row, raw, ours, published in zip(range(40), scores, adjusted, inverted, strict=True):
        order = published if int(raw.argmax()) in known else raw
        assert np.argsort(-ours).tolist() == np.argsort(-order).tolist(), row


def test_items_that_no_bank_query_finds_leave_a_query_alone():
    bank = np.array([[1.0, 0.0, 0.0]] * 5)
    scores = np.array([[0.9, 1.0, 0.0], [1.0, 0.95, 0.0]])
    adjusted = bank_softmax(bank, 10.0)(scores, ROWS)
    assert adjusted[0].tolist() == scores[0].tolist()  # its best item is not known as a hub
    assert adjusted[1].argmax() == 1  # the hub steps back


def test_large_scores_do_not_overflow():
    scores = np.array([[800.0, 790.0], [-900.0, 810.0]])
    assert np.isfinite(dual_softmax(scores, 100.0)(scores, ROWS)).all()
    assert np.isfinite(bank_softmax(scores, 100.0)(scores, ROWS)).all()


def test_a_collapsed_model_stays_collapsed():
    flat = np.full((20, 20), 0.3, np.float16)
    positives = Positives.from_lists([[i] for i in range(20)], 20)
    for adjust in (dual_softmax(flat, 50.0), bank_softmax(flat[:7], 50.0)):
        assert rank_scores(flat, positives, adjust=adjust).recall(1) == pytest.approx(np.full(20, 0.05))


def test_the_order_of_items_decides_nothing():
    random = np.random.default_rng(2)
    scores, bank = random.integers(0, 4, (30, 8)).astype(float), random.integers(0, 4, (9, 8)).astype(float)
    positives = Positives.from_lists([[i % 8] for i in range(30)], 8)
    moved = Positives.from_lists([[7 - i % 8] for i in range(30)], 8)
    before = rank_scores(scores, positives, adjust=bank_softmax(bank, 3.0))
    after = rank_scores(scores[:, ::-1], moved, adjust=bank_softmax(bank[:, ::-1], 3.0))
    np.testing.assert_array_equal(before.expected_rank(), after.expected_rank())


def test_a_bank_answers_one_query_as_it_answers_all():
    random = np.random.default_rng(3)
    scores, bank = random.standard_normal((50, 50)), random.standard_normal((200, 50))
    positives = Positives.from_lists([[i] for i in range(50)], 50)
    adjust = bank_softmax(bank, 20.0)
    together = rank_scores(scores, positives, adjust=adjust).expected_rank()
    for query in range(50):
        alone = rank_scores(scores[query : query + 1], Positives.from_lists([[query]], 50), adjust=adjust)
        assert alone.expected_rank()[0] == together[query]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_impossible_scales_are_refused(scale):
    for make in (dual_softmax, bank_softmax):
        with pytest.raises(ValueError, match="positive scale"):
            make(np.eye(3), scale)


def test_impossible_banks_are_refused():
    with pytest.raises(ValueError, match="1 of 9 scores are not finite"):
        bank_softmax(np.where(np.eye(3) * np.arange(3) == 2, np.nan, 0.0), 1.0)
    with pytest.raises(ValueError, match="non-empty"):
        bank_softmax(np.zeros((0, 3)), 1.0)
    with pytest.raises(ValueError, match="a bank over 4 items, got 3"):
        bank_softmax(np.eye(3), 1.0)(np.eye(4), ROWS)
