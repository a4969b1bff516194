"""The losses over claims against loops."""

import math

import pytest
import torch

from vlm.losses.claims import finding_loss, telling_loss


def test_finding_is_the_mean_over_claims_that_find_something() -> None:
    torch.manual_seed(0)
    video, text = torch.randn(3, 5), torch.randn(6, 5, requires_grad=True)
    positives = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    losses = []
    for claim in range(6):
        true_of = [row for row in range(3) if positives[row, claim]]
        if true_of:
            scores = [math.exp(float(text[claim].detach() @ video[row]) / 0.7) for row in range(3)]
            losses.append(-sum(math.log(scores[row] / sum(scores)) for row in true_of) / len(true_of))
    assert len(losses) == 3
    loss = finding_loss(video, text, 0.7, positives)
    assert float(loss.detach()) == pytest.approx(sum(losses) / 3, rel=1e-5)
    loss.backward()
    assert text.grad is not None and (text.grad[[1, 3, 5]] == 0).all() and (text.grad[[0, 2, 4]] != 0).any()
    assert float(finding_loss(video, text, 0.7, torch.zeros_like(positives)).detach()) == 0
    with pytest.raises(ValueError, match=r"positives must be \(3, 6\)"):
        finding_loss(video, text, 0.7, positives[:2])


def test_telling_compares_the_two_of_a_pair() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 0.0], [0.0, 0.0]])
    # margins 1 and -1.5, then -1 and 0: by softmax over the two of a pair
    expected = [-math.log(math.exp(a) / (math.exp(a) + math.exp(b))) for a, b in ((1, -1.5), (-1, 0))]
    assert float(telling_loss(logits)) == pytest.approx(sum(expected) / 2, rel=1e-6)
