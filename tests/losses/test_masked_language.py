"""The masking rule counted on many words, and the loss against a loop."""

import torch

from vlm.losses.masked_language import (
    IGNORED,
    MaskingRule,
    mask_tokens,
    masked_language_loss,
    masking_draws,
)

RULE = MaskingRule(pad_id=0, start_id=1, mask_id=2, vocabulary_size=1000)


def draws(rows, length, seed=0):
    return masking_draws(rows, length, torch.Generator().manual_seed(seed))


def test_half_are_chosen_and_split_80_10_10():
    ids = torch.full((500, 200), 7)
    ids[:, 0], ids[:, 150:] = RULE.start_id, RULE.pad_id
    masked = mask_tokens(ids, RULE, draws(500, 200))
    chosen = masked.labels != IGNORED
    assert not chosen[:, 0].any() and not chosen[:, 150:].any()
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    assert (masked.labels[chosen] == 7).all()
    n = 500 * 149
    assert abs(chosen.sum() / n - 0.5) < 4 * (0.25 / n) ** 0.5
    new = masked.input_ids[chosen]
    for share, expected in (((new == 2).float().mean(), 0.8), ((new == 7).float().mean(), 0.1)):
        # a random word equals 2 or 7 once in a thousand times
        assert abs(share - expected) < 4 * (0.16 / len(new)) ** 0.5 + 2e-4
    assert new.max() == 999 and new.min() == 0


def test_chosen_words_can_be_preferred():
    focus = torch.zeros(1000)
    focus[[5, 6]] = torch.tensor([2.0, 1.0])
    ids = torch.tensor([4, 5, 6]).repeat(2000, 1)
    hidden = mask_tokens(ids, RULE._replace(focus=focus), draws(2000, 3)).labels != IGNORED
    share = hidden.float().mean(0)
    assert share[0] == 0 and share[1] == 1 and abs(share[2] - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_masking_is_a_function_of_the_draws_and_longer_padding_changes_nothing():
    ids = torch.randint(3, 1000, (6, 9))
    first = mask_tokens(ids, RULE, draws(6, 9))
    padded = torch.nn.functional.pad(ids, (0, 4))
    second = mask_tokens(padded, RULE, draws(6, 13))
    assert torch.equal(first.input_ids, second.input_ids[:, :9])
    assert torch.equal(first.labels, second.labels[:, :9]) and (second.labels[:, 9:] == IGNORED).all()
    assert not torch.equal(first.labels, mask_tokens(ids, RULE, draws(6, 9, seed=1)).labels)


def test_loss_is_the_mean_over_hidden_words():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[IGNORED, 4, IGNORED], [0, IGNORED, 2]])
    terms = [-logits[i, j].log_softmax(0)[labels[i, j]] for i, j in ((0, 1), (1, 0), (1, 2))]
    assert torch.allclose(masked_language_loss(logits, labels), sum(terms) / 3)
    assert torch.allclose(masked_language_loss(logits, labels, 6), sum(terms) / 6)


def test_nothing_hidden_is_no_loss():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss = masked_language_loss(logits, torch.full((1, 2), IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0
