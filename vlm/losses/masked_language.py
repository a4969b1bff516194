"""Masked language modelling: which words are hidden, and the loss of guessing them from the rest.

Source: Devlin et al. 2019, BERT, section 3.1, with VideoMamba's ratio of one half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class MaskingRule(NamedTuple):
    """How texts are masked; the ids are the tokenizer's.

    ``focus`` (vocabulary,) float or None multiplies ``probability`` by token id: 0 never hides a word, 2
    hides it twice as often, up to always.
    """

    pad_id: int
    start_id: int
    mask_id: int
    vocabulary_size: int
    probability: float = 0.5
    focus: Tensor | None = None


class MaskedText(NamedTuple):
    """``input_ids`` (b, l) to encode; ``labels`` (b, l): a hidden word's id, -100 where nothing is asked."""

    input_ids: Tensor
    labels: Tensor


def mask_tokens(input_ids: Tensor, rule: MaskingRule, draws: Tensor) -> MaskedText:
    """Hide words of (b, l) ``input_ids``.

    Padding and the start token are never chosen; of the chosen, 80 % become the mask token, 10 % a random
    word of the whole vocabulary, and 10 % stay.

    Args:
        input_ids: (b, l) int64.
        rule: The ids and the probability.
        draws: (b, l, 3) uniform numbers in [0, 1), from ``masking_draws``; a pure function of them.
    """
    probability = torch.full(input_ids.shape, rule.probability, device=input_ids.device)
    if rule.focus is not None:
        probability = probability * rule.focus.to(input_ids.device)[input_ids]
    chosen = draws[..., 0] < probability
    chosen &= (input_ids != rule.pad_id) & (input_ids != rule.start_id)
    hidden = chosen & (draws[..., 1] < 0.8)
    swapped = chosen & (draws[..., 1] >= 0.8) & (draws[..., 1] < 0.9)
    random_ids = (draws[..., 2] * rule.vocabulary_size).long().clamp_max(rule.vocabulary_size - 1)
    masked = torch.where(hidden, rule.mask_id, torch.where(swapped, random_ids, input_ids))
    return MaskedText(masked, input_ids.masked_fill(~chosen, IGNORED))


def masking_draws(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return (rows, length, 3) uniform numbers; a shorter length gets the first columns of a longer one."""
    return torch.rand(length, rows, 3, generator=generator).transpose(0, 1)


def masked_language_loss(logits: Tensor, labels: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Return the mean cross-entropy of the hidden words; 0 with a gradient of zero if none is hidden.

    Args:
        logits: (b, l, vocabulary).
        labels: (b, l), -100 where nothing is asked.
        total: Divisor; the number of hidden words if None.
    """
    flat = labels.reshape(-1)
    loss = F.cross_entropy(logits.float().reshape(len(flat), -1), flat, ignore_index=IGNORED, reduction="sum")
    return loss / ((labels != IGNORED).sum().clamp_min(1) if total is None else total)
