"""Hard negatives: published weights, exclusion of true pairs, and the batches that broke the original."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.losses.matching import draw_negatives, matching_loss, matching_pairs, negative_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("which", ["idx", "noidx"])
def test_weights_are_proportional_to_the_published_ones(which):
    published = load_file(FIXTURES / "losses_metrics.safetensors")
    ids = published["input/idx"] if which == "idx" else torch.arange(6)
    positives = ids[:, None] == ids[None]
    scores = published["get_sim/v3_t2/mean/v2t"]
    for direction, matrix in (("v2t", scores), ("t2v", scores.T)):
        expected = published[f"vtm_weights/{which}/{direction}"]
        expected = expected / expected.sum(1, keepdim=True)
        actual = negative_weights(matrix, positives)
        assert float((actual - expected).abs().max()) < 2e-5
        assert (actual[positives] == 0).all()


def test_a_confident_model_still_has_negatives():
    weights = negative_weights(torch.eye(4) * 1e4, torch.eye(4, dtype=torch.bool))
    assert torch.allclose(weights, (1 - torch.eye(4)) / 3)


def test_draws_follow_the_weights_and_never_repeat_in_a_row():
    weights = torch.tensor([[0.0, 0.7, 0.2, 0.1]]).expand(20_000, 4)
    rows, columns = draw_negatives(weights, 1, generator())
    assert torch.equal(rows, torch.arange(20_000))
    share = torch.bincount(columns, minlength=4) / 20_000
    # four standard deviations of a binomial share at n = 20,000
    assert (share - weights[0]).abs().max() < 4 * (0.25 / 20_000) ** 0.5 and share[0] == 0
    rows, columns = draw_negatives(weights[:50], 5, generator())
    assert len(columns) == 150 and columns.reshape(50, 3).sort(1).values.eq(torch.tensor([1, 2, 3])).all()


def test_each_true_pair_comes_with_one_false_pair_a_side():
    positives = torch.eye(6, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = positives[1, 2] = True
    pairs = matching_pairs(torch.randn(6, 6), positives, generator=generator())
    assert len(pairs.label) == 18 and pairs.label.tolist() == [1] * 6 + [0] * 12
    assert torch.equal(pairs.video[:6], pairs.text[:6])
    assert pairs.text[6:12].tolist() == list(range(6)) and pairs.video[12:].tolist() == list(range(6))
    assert not positives[pairs.video[6:], pairs.text[6:]].any()


def test_negatives_are_the_similar_ones():
    similarity = torch.zeros(3, 3)
    similarity[0, 2] = 50  # video 0 looks like text 2
    pairs = matching_pairs(similarity, torch.eye(3, dtype=torch.bool), generator=generator())
    false = list(zip(pairs.video[3:].tolist(), pairs.text[3:].tolist(), strict=True))
    assert false.count((0, 2)) == 2  # once as video 0's text, once as text 2's video


@pytest.mark.parametrize("size", [1, 4])
def test_rows_without_a_false_partner_are_left_out(size):
    pairs = matching_pairs(torch.randn(size, size), torch.ones(size, size, dtype=torch.bool))
    assert pairs.label.tolist() == [1] * size
    loss = matching_loss(torch.zeros(size, 2, requires_grad=True), pairs.label)
    assert torch.allclose(loss, torch.tensor(2.0).log())


def test_siblings_add_negatives_of_the_same_group_only():
    positives = torch.eye(4, dtype=torch.bool)
    group = torch.tensor([0, 0, 1, 1])
    siblings = group[:, None] == group[None]
    pairs = matching_pairs(
        torch.randn(4, 4),
        positives,
        num_negatives=0,
        siblings=siblings,
        num_siblings=3,
        generator=generator(),
    )
    false = sorted(zip(pairs.video[4:].tolist(), pairs.text[4:].tolist(), strict=True))
    assert false == sorted([(0, 1), (1, 0), (2, 3), (3, 2)] * 2)


def test_equal_generators_choose_equal_pairs_and_unequal_ones_do_not():
    similarity, positives = torch.randn(8, 8), torch.eye(8, dtype=torch.bool)
    first, second, other = (matching_pairs(similarity, positives, generator=generator(s)) for s in (3, 3, 4))
    assert torch.equal(first.video, second.video) and torch.equal(first.text, second.text)
    assert not torch.equal(first.video, other.video)


def test_loss_is_the_mean_cross_entropy_or_the_given_share_of_the_sum():
    logits, label = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    terms = [-torch.tensor(x).log_softmax(0)[0] for x in ([2.0, 0.0], [0.0, 1.0])]
    assert torch.allclose(matching_loss(logits, label), sum(terms) / 2)
    assert torch.allclose(matching_loss(logits, label, 8), sum(terms) / 8)
    assert matching_loss(logits[:0], label[:0]) == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="must be square and equal in shape"):
        matching_pairs(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="positives must be true on the diagonal"):
        matching_pairs(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))
