"""Ranks against every order of the ties, by hand, and as properties."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics import (
    Positives,
    bank_softmax,
    chance_counts,
    check_finite,
    demand_share,
    dual_softmax,
    matrices,
    merge_duplicates,
    rank_candidates,
    rank_scores,
    strict_ceiling,
    top_candidates,
)


@st.composite
def tied_problems(draw, max_items=6):
    items = draw(st.integers(1, max_items))
    queries = draw(st.integers(1, 4))
    row = st.lists(st.integers(-2, 2), min_size=items, max_size=items)
    scores = np.asarray([draw(row) for _ in range(queries)], np.float32)
    column = st.lists(st.integers(0, items - 1), min_size=1, max_size=items, unique=True)
    return scores, [draw(column) for _ in range(queries)]


@settings(max_examples=120, deadline=None)
@given(tied_problems())
def test_expectation_over_all_tie_orders(all_orders, problem):
    scores, lists = problem
    counts = rank_scores(scores, Positives.from_lists(lists, scores.shape[1]))
    for query, right in enumerate(lists):
        ranks = all_orders(scores[query], right)
        assert counts.expected_rank()[query] == pytest.approx(ranks.mean(), abs=1e-12)
        for k in range(1, scores.shape[1] + 1):
            assert counts.recall(k)[query] == pytest.approx((ranks <= k).mean(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(tied_problems(max_items=9), st.randoms(use_true_random=False))
def test_order_of_items_and_queries_changes_nothing(problem, random):
    scores, lists = problem
    items, queries = list(range(scores.shape[1])), list(range(len(scores)))
    random.shuffle(items)
    random.shuffle(queries)
    column = {item: place for place, item in enumerate(items)}
    moved = [[column[item] for item in lists[query]] for query in queries]
    before = rank_scores(scores, Positives.from_lists(lists, len(items)))
    after = rank_scores(scores[queries][:, items], Positives.from_lists(moved, len(items)))
    np.testing.assert_array_equal(after.expected_rank(), before.expected_rank()[queries])
    np.testing.assert_array_equal(after.recall(1), before.recall(1)[queries])


@settings(max_examples=60, deadline=None)
@given(tied_problems(max_items=8))
def test_both_directions_agree_with_the_transposed_problem(problem):
    scores, lists = problem
    backward, kept = Positives.from_lists(lists, scores.shape[1]).reversed()
    owners = [[q for q, right in enumerate(lists) if item in right] for item in range(scores.shape[1])]
    assert kept.tolist() == [item for item, queries in enumerate(owners) if queries]
    assert [backward[row].tolist() for row in range(len(backward))] == [q for q in owners if q]
    direct = rank_scores(np.ascontiguousarray(scores.T)[kept], backward)
    strided = rank_scores(scores.T, backward, rows=kept)
    np.testing.assert_array_equal(direct.expected_rank(), strided.expected_rank())


def test_by_hand():
    scores = np.array([[9, 7, 7, 1, 7], [0, 5, 5, 5, 5], [1, 2, 3, 4, 5]], np.float32)
    counts = rank_scores(scores, Positives.from_lists([[2, 4], [0], [3, 4, 0]], 5))
    assert counts.above.tolist() == [1, 4, 0]
    assert counts.tied.tolist() == [3, 1, 1]
    assert counts.tied_positives.tolist() == [2, 1, 1]
    assert counts.is_tied.tolist() == [True, False, False]
    # of three tied items behind one better, two are right: second place is right in 2 of 3 orders
    assert counts.recall(1).tolist() == [0, 0, 1]
    assert counts.recall(2) == pytest.approx([2 / 3, 0, 1])
    assert counts.recall(3).tolist() == [1, 0, 1]
    assert counts.expected_rank() == pytest.approx([1 + 4 / 3, 5, 1])


@pytest.mark.parametrize(
    ("tied", "right", "draws"), [(100, 3, 50), (2990, 20, 10), (60000, 1, 50), (7, 7, 1)]
)
def test_hypergeometric_with_large_numbers(tied, right, draws):
    counts = chance_counts(Positives.from_lists([list(range(right))], tied))
    exact = 1 - Fraction(math.comb(tied - right, draws), math.comb(tied, draws))
    assert counts.recall(draws)[0] == pytest.approx(float(exact), rel=1e-12)
    assert counts.expected_rank()[0] == pytest.approx((tied + 1) / (right + 1))


@pytest.mark.parametrize("items", [1, 2, 17, 1000])
def test_a_collapsed_model_scores_one_over_n(items, diagonal):
    counts = rank_scores(np.full((items, items), 0.25, np.float32), diagonal(items))
    assert counts.recall(1) == pytest.approx(np.full(items, 1 / items))
    assert counts.expected_rank() == pytest.approx(np.full(items, (items + 1) / 2))
    assert counts.is_tied.sum() == (items if items > 1 else 0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "float16", "float32", "float64"])
def test_types_give_the_same_ranks(dtype, diagonal):
    scores = np.random.default_rng(1).integers(0, 100, (30, 30))
    expected = rank_scores(scores.astype(np.float64), diagonal(30)).expected_rank()
    np.testing.assert_array_equal(rank_scores(scores.astype(dtype), diagonal(30)).expected_rank(), expected)


def test_small_integers_do_not_wrap_around(diagonal):
    scores = np.array([[127, -128], [-128, 127]], np.int8)
    assert rank_scores(scores, diagonal(2)).recall(1).tolist() == [1, 1]
    assert top_candidates(np.array([[-128, 127, 5]], np.int8), 2)[0].tolist() == [[1, 2]]


def test_bfloat16_as_numpy_saves_it(tmp_path, diagonal):
    exact = np.random.default_rng(2).standard_normal((20, 20)).astype(np.float32)
    bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
    truncated = (bits.astype(np.uint32) << 16).view(np.float32)
    void = bits.view("V2")
    np.save(tmp_path / "scores.npy", void)
    loaded = np.load(tmp_path / "scores.npy", mmap_mode="r")
    counts = rank_scores(loaded, diagonal(20))
    np.testing.assert_array_equal(
        counts.expected_rank(), rank_scores(truncated, diagonal(20)).expected_rank()
    )
    with pytest.raises(ValueError, match="not finite"):
        check_finite(np.full((2, 2), 0x7FC0, np.uint16).view("V2"))


def test_half_precision_is_promoted_before_it_is_compared(diagonal):
    # 2049 is not an fp16 number; promoted scores keep what the file says and invent no order
    scores = np.array([[2048, 2049], [1, 2]], np.float16)
    assert rank_scores(scores, diagonal(2)).is_tied.tolist() == [True, False]


def test_wide_types_keep_their_order(diagonal):
    scores = np.array([[1.0 + 1e-12, 1.0], [0.0, 1.0]])
    assert rank_scores(scores, diagonal(2)).recall(1).tolist() == [1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_refused_with_count_and_place(value):
    scores = np.zeros((400, 300), np.float32)
    scores[[350, 399], [7, 299]] = value
    with pytest.raises(ValueError, match=r"2 of 120000 scores .* first at \(query, item\) = \(350, 7\)"):
        rank_scores(scores, Positives.from_lists([[0]] * 400, 300))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0], []], "query 1.*non-empty"),
        ([[0], [3]], "column 3 is outside 0..2"),
        ([[-1], [0]], "column -1 is outside"),
        ([[0.5], [0]], "query 0"),
        ([["a"], [0]], "query 0"),
        ([[True], [0]], "query 0"),
        ([[[0]], [0]], "query 0"),
        ([], "no query"),
    ],
)
def test_wrong_positives_are_refused(lists, message):
    with pytest.raises(ValueError, match=message):
        Positives.from_lists(lists, 3)


def test_positives_from_a_matrix_and_repeats():
    truth = np.array([[True, False, True], [False, True, False]])
    positives = Positives.from_matrix(truth)
    assert [positives[0].tolist(), positives[1].tolist()] == [[0, 2], [1]]
    assert Positives.from_lists([[2, 0, 2], [1]], 3).items.tolist() == positives.items.tolist()
    with pytest.raises(ValueError, match="query 1"):
        Positives.from_matrix(truth & [[True], [False]])
    with pytest.raises(ValueError, match="boolean"):
        Positives.from_matrix(truth.astype(int))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (0, 3), (3,), (3, 3, 1)])
def test_wrong_shapes_are_refused(shape, diagonal):
    with pytest.raises(ValueError, match="expected"):
        rank_scores(np.zeros(shape, np.float32), diagonal(3))


@pytest.mark.parametrize("dtype", ["complex64", "U1", "O", "V4", "?"])
def test_what_is_not_a_number_is_refused(dtype, diagonal):
    with pytest.raises(ValueError, match="real scores"):
        rank_scores(np.zeros((2, 2), dtype), diagonal(2))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_recall_beyond_the_gallery_is_refused(k, diagonal):
    with pytest.raises(ValueError, match="1 <= k <= 3"):
        rank_scores(np.eye(3), diagonal(3)).recall(k)


def test_blocks_do_not_show(monkeypatch):
    random = np.random.default_rng(3)
    scores = random.integers(0, 9, (50, 40)).astype(np.float32)
    lists = [random.choice(40, random.integers(1, 5), replace=False).tolist() for _ in range(50)]
    positives = Positives.from_lists(lists, 40)
    whole = rank_scores(scores, positives)
    monkeypatch.setattr(matrices, "BLOCK_BYTES", 8 * 40 * 3)
    blocks = rank_scores(scores, positives)
    for name in ("above", "tied", "tied_positives"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))


def test_memory_beside_the_matrix_is_bounded():
    scores = np.zeros((3000, 4000), np.int8)
    positives = Positives.from_lists([[0]] * 3000, 4000)
    tracemalloc.start()
    rank_scores(scores, positives)
    backward, kept = positives.reversed()
    rank_scores(scores.T, backward, rows=kept)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20  # as documented; the whole matrix in fp32, several times, would be more


def test_memory_is_that_of_a_block_and_not_of_the_matrix(tmp_path, monkeypatch):
    """Twelve megabytes of scores on disk, ranked with corrections in both directions within a few blocks."""
    monkeypatch.setattr(matrices, "BLOCK_BYTES", 2**19)
    np.save(tmp_path / "s.npy", np.random.default_rng(0).integers(-9, 9, (6000, 2000), np.int8))
    scores = np.load(tmp_path / "s.npy", mmap_mode="r")
    positives = Positives.from_lists([[i % 2000] for i in range(6000)], 2000)
    backward, kept = positives.reversed()
    tracemalloc.start()
    check_finite(scores)
    rank_scores(scores, positives, adjust=dual_softmax(scores, 1.0), checked=True)
    rank_scores(scores.T, backward, rows=kept, adjust=dual_softmax(scores.T, 1.0), checked=True)
    rank_scores(scores, positives, adjust=bank_softmax(scores[:500], 1.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20  # in fp64 the matrix would be 96 MB


def test_candidates_equal_the_full_matrix_where_all_are_scored():
    random = np.random.default_rng(4)
    scores = random.integers(0, 5, (20, 8)).astype(np.float32)
    lists = [random.choice(8, random.integers(1, 4), replace=False).tolist() for _ in range(20)]
    positives = Positives.from_lists(lists, 8)
    candidates, cut = top_candidates(random.standard_normal((20, 8)), 8)
    reranked = rank_candidates(candidates, np.take_along_axis(scores, candidates, axis=1), positives)
    full = rank_scores(scores, positives)
    assert cut == 0
    np.testing.assert_array_equal(reranked.expected_rank(), full.expected_rank())


def test_a_positive_outside_the_candidates_has_no_rank():
    positives = Positives.from_lists([[5], [1]], 6)
    counts = rank_candidates(
        np.array([[0, 1, 2], [0, 1, 2]]), np.array([[-200.0, -300, -400]] * 2), positives
    )
    assert [counts.recall(k).tolist() for k in (1, 2, 3)] == [[0, 0], [0, 1], [0, 1]]
    with pytest.raises(ValueError, match="k <= 3"):
        counts.recall(5)
    with pytest.raises(ValueError, match="do not exist"):
        counts.expected_rank()


def test_candidates_are_the_best_and_cuts_in_ties_are_drawn():
    scores = np.array([[3, 1, 2, 0]], np.float32)
    assert top_candidates(scores, 3)[0].tolist() == [[0, 2, 1]]
    assert top_candidates(scores, 9)[0].shape == (1, 4)
    flat = np.zeros((4000, 10), np.float32)
    chosen, cut = top_candidates(flat, 1)
    assert cut == 4000
    share = np.bincount(chosen[:, 0], minlength=10) / 4000
    assert np.abs(share - 0.1).max() < 5 * math.sqrt(0.09 / 4000)  # no place in the gallery is preferred
    np.testing.assert_array_equal(chosen, top_candidates(flat, 1)[0])
    with pytest.raises(ValueError, match="k >= 1"):
        top_candidates(flat, 0)
    with pytest.raises(ValueError, match="not finite"):
        top_candidates(np.full((1, 2), np.nan), 1)


def test_bits_of_bfloat16_are_no_integers(diagonal):
    """Negative bfloat16 numbers sort backwards as uint16, so the type is not guessed."""
    bits = (np.array([[-1.0, -2.0], [-2.0, -1.0]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert rank_scores(bits.astype(np.int32), diagonal(2)).recall(1).tolist() == [0, 0]
    assert rank_scores(bits.view("V2"), diagonal(2)).recall(1).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"uint16.*view\('V2'\).*int32"):
        rank_scores(bits, diagonal(2))


def test_equal_queries_share_their_positives():
    strict = Positives.from_lists([[0], [1], [2, 5], [3], [4]], 6)
    aware = merge_duplicates(strict, ["a", "b", "a", "c", "b"])
    assert [aware[query].tolist() for query in range(5)] == [[0, 2, 5], [1, 4], [0, 2, 5], [3], [1, 4]]
    same = merge_duplicates(strict, list("abcde"))
    assert same.items.tolist() == strict.items.tolist() and same.offsets.tolist() == strict.offsets.tolist()
    with pytest.raises(ValueError, match="expected 5 labels"):
        merge_duplicates(strict, ["a"])


def test_share_of_the_gallery_that_is_wanted():
    assert demand_share(Positives.from_lists([[i] for i in range(7)], 7)) == pytest.approx(1)
    assert demand_share(Positives.from_lists([[i // 20] for i in range(200)], 10)) == pytest.approx(1)
    assert demand_share(Positives.from_lists([[i % 40] for i in range(200)], 1000)) == pytest.approx(0.04)
    assert demand_share(Positives.from_lists([[0, 1]], 4)) == pytest.approx(0.5)


def test_ceiling_of_the_strict_rule():
    """Of three equal queries two want item 0 and one item 1: whoever scores them alike gets two."""
    positives = Positives.from_lists([[0], [0], [1], [2, 3], [3]], 4)
    assert strict_ceiling(positives, ["a", "a", "a", "b", "c"]) == pytest.approx(4 / 5)
    assert strict_ceiling(positives, ["a", "a", "a", "b", "b"]) == pytest.approx(4 / 5)  # item 3 serves both
    assert strict_ceiling(positives, list("abcde")) == 1.0
