"""Known wrong answers of evaluators in the field, re-implemented, beside the right ones."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.metrics import Positives, check_finite, rank_candidates, rank_scores, top_candidates

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
