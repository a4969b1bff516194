"""Known wrong answers of evaluators in the field, re-implemented, beside the right ones."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from vlm.metrics import (
    Positives,
    bank_softmax,
    bootstrap_mean,
    check_finite,
    demand_share,
    dual_softmax,
    merge_duplicates,
    paired_difference,
    rank_candidates,
    rank_scores,
    strict_ceiling,
    top_candidates,
)

N = 1000


@pytest.fixture(scope="module")
def scores():
    """A model of ordinary quality: right pairs stand a little above the noise."""
    matrix = np.random.default_rng(7).standard_normal((N, N)).astype(np.float32)
    matrix[np.arange(N), np.arange(N)] += 2.0
    return matrix


def test_without_ties_everybody_agrees(scores, diagonal, peers):
    ours = 100 * rank_scores(scores, diagonal(N)).recall(1).mean()
    assert 5 < ours < 30
    assert peers["clip4clip"](scores) == (pytest.approx(ours), N)
    assert peers["argsort"](scores) == pytest.approx(ours)
    assert peers["optimistic"](scores) == pytest.approx(ours)


def test_constant_matrix(diagonal, peers):
    """A collapsed model: 0.1 % by sorting, which is luck, and 100 % by optimistic ties."""
    flat = np.zeros((N, N), np.float32)
    counts = rank_scores(flat, diagonal(N))
    assert peers["optimistic"](flat) == 100.0
    assert peers["clip4clip"](flat) == (pytest.approx(0.1), N * N)  # a million "queries"
    assert peers["argsort"](flat) == pytest.approx(0.1)
    # a gallery of which the right item stands last is enough to make the same rule say 100 %
    assert peers["argsort"](flat[:1]) == 0.0
    assert 100 * float(np.argsort(flat[0])[::-1][0] == N - 1) == 100.0
    assert 100 * counts.recall(1).mean() == pytest.approx(0.1)
    assert counts.expected_rank() == pytest.approx(np.full(N, 500.5))
    assert counts.is_tied.all()


def test_quantised_scores(scores, diagonal, peers):
    """int8: every tied column counted as one more query divides the result by ten."""
    coarse = np.clip(np.round(scores * 4), -128, 127).astype(np.int8)
    truth = 100 * rank_scores(scores, diagonal(N)).recall(1).mean()
    counts = rank_scores(coarse, diagonal(N))
    ours = 100 * counts.recall(1).mean()
    wrong, rows = peers["clip4clip"](coarse.astype(np.float32))
    assert rows > 10 * N
    assert wrong < truth / 5
    assert abs(ours - truth) < 2.0
    assert peers["optimistic"](coarse) > ours + 2.0
    assert counts.is_tied.sum() > N / 2


def test_bfloat16_truncation(scores, diagonal, peers):
    truncated = ((scores.view(np.uint32) >> 16) << 16).view(np.float32)
    truth = 100 * rank_scores(scores, diagonal(N)).recall(1).mean()
    wrong, rows = peers["clip4clip"](truncated)
    assert rows > 1.2 * N
    assert wrong < truth - 1.0
    assert abs(100 * rank_scores(truncated, diagonal(N)).recall(1).mean() - truth) < 0.5


def test_not_a_number_makes_a_model_look_better(scores, diagonal, peers):
    """NaN on a tenth of the right pairs: sorting puts it first, or drops the query; we refuse."""
    broken = scores.copy()
    broken[np.arange(100), np.arange(100)] = np.nan
    truth = 100 * rank_scores(np.nan_to_num(broken, nan=-np.float32(1e9)), diagonal(N)).recall(1).mean()
    assert peers["argsort"](broken) > truth + 8.0
    with np.errstate(invalid="ignore"):
        assert peers["clip4clip"](broken)[1] == N - 100
    with pytest.raises(ValueError, match="100 of 1000000 scores are not finite"):
        rank_scores(broken, diagonal(N))


def test_broken_videos_sink_the_whole_set(scores, peers):
    broken = scores.copy()
    broken[:, :50] = np.nan
    assert peers["argsort"](broken) < 1.0
    with pytest.raises(ValueError, match="50000 of 1000000"):
        check_finite(broken)


def test_many_captions_a_video():
    """MSVD: pooling a video's captions to one column answers an easier question than ranking them all."""
    captions = 20
    owner = np.repeat(np.arange(50), captions)
    random = np.random.default_rng(8)
    alike = random.standard_normal((50, 50))  # captions of one video resemble each other
    matrix = (alike[owner] + 0.5 * random.standard_normal((N, 50))).astype(np.float32)
    matrix[np.arange(N), owner] += 1.0
    backward, kept = Positives.from_lists(owner[:, None].tolist(), 50).reversed()
    ours = rank_scores(matrix.T, backward, rows=kept)
    pooled = matrix.reshape(50, captions, 50).max(axis=1).T
    pooled_recall = np.mean(pooled.argmax(axis=1) == np.arange(50))
    best_true = [np.sort(-matrix[:, v]).searchsorted(-matrix[owner == v, v].max()) for v in range(50)]
    assert ours.expected_rank() == pytest.approx(np.asarray(best_true) + 1)
    # the first place is the same by either rule; the fifth is not, because the pool is 20 times smaller
    assert ours.recall(1).mean() == pytest.approx(pooled_recall)
    fifth = np.mean([np.argsort(-row)[:5].tolist().count(v) for v, row in enumerate(pooled)])
    assert fifth > ours.recall(5).mean() + 0.02


def test_duplicate_captions():
    """Two queries with the same words and different videos: the strict ceiling is a half, and says so."""
    perfect = np.eye(10, dtype=np.float32)
    perfect[0, 1] = perfect[1, 0] = 1.0  # same caption, hence the same scores
    strict = rank_scores(perfect, Positives.from_lists([[i] for i in range(10)], 10))
    aware = rank_scores(perfect, Positives.from_lists([[0, 1], [0, 1], *([i] for i in range(2, 10))], 10))
    assert strict.recall(1).mean() == pytest.approx(0.9)
    assert aware.recall(1).mean() == 1.0
    assert strict.is_tied.sum() == 2
    assert aware.is_tied.sum() == 0
    # by column order the same model gets 0.9 in one gallery and, reversed, the other query's half instead
    assert np.argsort(-perfect[0], kind="stable")[0] == 0
    assert np.argsort(-perfect[1], kind="stable")[0] == 0


def test_duplicate_captions_of_the_1k_a_test_set(shared):
    """Four texts, nine queries: half a point below certainty for a perfect model, by the strict rule."""
    from vlm.text import clean

    with (shared / "annotations" / "msrvtt" / "MSRVTT_JSFUSION_test.csv").open(newline="") as file:
        labels = [clean(row["sentence"]) for row in csv.DictReader(file)]
    strict = Positives.from_lists([[i] for i in range(N)], len(labels))
    shared_by = merge_duplicates(strict, labels).sizes > 1
    assert shared_by.sum() == 9
    assert len({label for label, several in zip(labels, shared_by, strict=True) if several}) == 4
    assert strict_ceiling(strict, labels) == pytest.approx(1 - 0.0050)


def test_rerank_fill_values_are_not_ranks(scores, diagonal):
    """-100 for what was not scored: ranks beyond k are those of the fill's tie order."""
    k = 3
    candidates, _ = top_candidates(scores, k)
    logits = np.random.default_rng(9).standard_normal((N, k)).astype(np.float32)
    filled = np.full((N, N), -100, np.float32)
    np.put_along_axis(filled, candidates, logits, axis=1)
    sorted_rank = [int(np.flatnonzero(np.argsort(row)[::-1] == i)[0]) for i, row in enumerate(filled)]
    counts = rank_candidates(candidates, logits, diagonal(N))
    for depth in (1, 2, 3):
        assert counts.recall(depth).mean() == pytest.approx(np.mean(np.asarray(sorted_rank) < depth))
    # "R@500" of a model that looked at three items
    assert np.mean(np.asarray(sorted_rank) < 500) > counts.recall(3).mean() + 0.2
    with pytest.raises(ValueError, match="k <= 3"):
        counts.recall(10)
    with pytest.raises(ValueError, match="do not exist"):
        counts.expected_rank()


def test_median_rank_after_reranking_is_the_order_of_fill_values(scores, diagonal):
    """MdR and MnR beyond k move with the gallery's order although no score does; ours are refused."""
    k = 10
    candidates, _ = top_candidates(scores, k)
    filled = np.full((N, N), -100, np.float32)
    np.put_along_axis(filled, candidates, np.take_along_axis(scores, candidates, axis=1), axis=1)
    ranks = np.asarray([np.flatnonzero(np.argsort(row)[::-1] == i)[0] + 1 for i, row in enumerate(filled)])
    turned = filled[::-1, ::-1]  # the same gallery, written from the other end
    backward = [np.flatnonzero(np.argsort(row)[::-1] == i)[0] + 1 for i, row in enumerate(turned)]
    assert np.median(ranks) > k
    assert np.abs(np.sort(ranks) - np.sort(backward)).max() > 1
    counts = rank_candidates(candidates, np.take_along_axis(scores, candidates, axis=1), diagonal(N))
    assert counts.average_precision is None
    assert counts.ndcg is not None  # ten places were scored
    with pytest.raises(ValueError, match="do not exist"):
        counts.expected_rank()


def test_softmax_over_fill_values_makes_ties_of_everything(scores):
    """A softmax after the fill underflows outside the k scored, so that "ranks" there are a tie's order."""
    candidates, _ = top_candidates(scores, 3)
    filled = np.full((N, N), -100, np.float32)
    np.put_along_axis(filled, candidates, np.take_along_axis(scores, candidates, axis=1), axis=1)
    powers = np.exp(filled - filled.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    assert (np.count_nonzero(shares > 1e-37, axis=1) == 3).all()


@pytest.fixture(scope="module")
def hubs():
    """Ordinary scores, some items of which are near to every query, and a bank of the same kind."""
    random = np.random.default_rng(11)
    lift = 0.6 * random.standard_normal(N)
    raw = random.standard_normal((N, N)) + lift
    bank = random.standard_normal((2 * N, N)) + lift
    return raw, bank


def _recall(raw, positives, adjust=None):
    return 100 * float(rank_scores(raw, positives, adjust=adjust).recall(1).mean())


def test_dual_softmax_knows_the_other_test_queries(hubs, diagonal):
    """Points gained on a one-to-one set, none at all for a query by itself; the bank's gain stays."""
    raw, bank = hubs[0] + 3.2 * np.eye(N), hubs[1]
    plain, corrected = bank_softmax(bank, 1.0), _recall(raw, diagonal(N), bank_softmax(bank, 1.0))
    before = _recall(raw, diagonal(N))
    assert 20 < before < 40
    assert _recall(raw, diagonal(N), dual_softmax(raw, 1.0)) > before + 3
    assert corrected > before + 1.5
    alone, alone_bank = [], []
    for query in range(0, N, 5):
        row, right = raw[query : query + 1], Positives.from_lists([[query]], N)
        alone.append(_recall(row, right, dual_softmax(row, 1.0)) - _recall(row, right))
        whole = rank_scores(raw[query : query + 1], right, adjust=plain)
        alone_bank.append(100 * whole.recall(1)[0])
    assert not np.any(alone)
    assert np.mean(alone_bank) == pytest.approx(
        np.mean(100 * rank_scores(raw, diagonal(N), adjust=plain).recall(1)[::5])
    )


def test_dual_softmax_loses_where_some_items_are_popular(hubs):
    """Two hundred queries for forty items: what many want is taken for a hub. The demand says so."""
    random = np.random.default_rng(12)
    wanted = random.choice(N, 40, replace=False)[np.arange(200) % 40]
    raw = hubs[0][:200].copy()
    raw[np.arange(200), wanted] += 2.8
    positives = Positives.from_lists(wanted[:, None].tolist(), N)
    before = _recall(raw, positives)
    assert _recall(raw, positives, dual_softmax(raw, 50.0)) < before - 8
    assert _recall(raw, positives, bank_softmax(hubs[1], 1.0)) > before - 3
    assert demand_share(positives) == pytest.approx(0.04)
    assert demand_share(Positives.from_lists([[i] for i in range(N)], N)) == pytest.approx(1.0)


def test_noise_of_common_test_sets():
    """Three points to either side at 1,000 queries, five at 174; 34.7 and 35.6 are no difference."""
    for queries, hits, half in ((1000, 356, 3.0), (174, 153, 4.9), (4917, 2016, 1.4)):
        interval = bootstrap_mean((np.arange(queries) < hits).astype(float), np.arange(queries))
        assert 50 * (interval.high - interval.low) == pytest.approx(half, abs=0.25)
    first, second = np.zeros((2, 1000))
    first[:347], second[67:423] = 1.0, 1.0  # 280 hits in common
    difference = paired_difference(first, second, np.arange(1000))
    assert difference.value == pytest.approx(0.009)
    assert difference.low < -0.01 < 0.02 < difference.high


def test_hit_and_recall_over_all_positives_differ():
    """One of four right items in the first place: a hit, although a quarter is recalled."""
    scores = np.array([[9.0, 1, 1, 1, 8, 7, 6, 5]])
    counts = rank_scores(scores, Positives.from_lists([[0, 1, 2, 3]], 8))
    assert counts.recall(1).tolist() == [1.0]
    assert len({0, 1, 2, 3} & set(np.argsort(-scores[0])[:1].tolist())) / 4 == 0.25
    assert counts.average_precision[0] < 0.7  # the measure that asks for all of them


def test_a_half_downloaded_gallery_scores_higher(scores, diagonal):
    """Skipping what is not on disk shrinks the gallery; the number of items belongs to the result."""
    whole = rank_scores(scores[: N // 2], diagonal(N // 2, N))
    half = rank_scores(scores[: N // 2, : N // 2], diagonal(N // 2))
    assert (half.expected_rank() <= whole.expected_rank()).all()
    assert half.recall(10).mean() > whole.recall(10).mean() + 0.05
    assert (whole.num_items, half.num_items) == (N, N // 2)
