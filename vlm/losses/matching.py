"""Video-text matching: which pairs a fusion model should tell apart, and the loss over its answers.

Negatives are drawn from the model's own similarities, never from pairs that are true.
Source: Li et al. 2024, VideoMamba, section 3.4 (after ALBEF).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs to score, as indices into the global batch: ``video``, ``text``, ``label`` (pairs,) int64."""

    video: Tensor
    text: Tensor
    label: Tensor

    def select(self, keep: Tensor) -> Pairs:
        """Return the pairs where ``keep`` (pairs,) is true."""
        return Pairs(self.video[keep], self.text[keep], self.label[keep])


def negative_weights(similarity: Tensor, positives: Tensor) -> Tensor:
    """Return each row's probabilities of its negatives: softmax with all true pairs left out.

    Args:
        similarity: (rows, columns) similarities, already divided by the temperature.
        positives: (rows, columns) bool, true where the pair is true.

    Returns:
        (rows, columns) fp32; rows sum to 1, or are all zero where every pair is true. Computed among the
        negatives alone, so a confident model (whose true pair takes all of the softmax) still has negatives.
    """
    scores = torch.nan_to_num(similarity.detach().float())
    weights = scores.masked_fill(positives, -torch.inf).softmax(dim=1)
    return torch.nan_to_num(weights, nan=0.0)


def draw_negatives(
    weights: Tensor, num: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw up to ``num`` different columns for each row; rows without weight draw none.

    Returns:
        rows, columns: (draws,) int64 each, sorted by row.
    """
    usable = weights > 0
    # Gumbel's trick draws without replacement in one pass, and needs no special case for short rows
    noise = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
    keys = weights.double().cpu().log() - (-noise.clamp_min(1e-300).log()).log()
    num = min(num, weights.shape[1])
    columns = keys.topk(num, dim=1).indices.to(weights.device)
    rows = torch.arange(len(weights), device=weights.device)[:, None].expand_as(columns)
    keep = usable.gather(1, columns)
    return rows[keep], columns[keep]


def matching_pairs(
    similarity: Tensor,
    positives: Tensor,
    *,
    num_negatives: int = 1,
    siblings: Tensor | None = None,
    num_siblings: int = 0,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Choose the pairs of one step: each true pair, and for each video and each text its hard negatives.

    Args:
        similarity: (B, B) similarities divided by the temperature, rows are videos; not differentiated.
        positives: (B, B) bool, true where text j is true of video i.
        num_negatives: Negatives drawn from softmax(similarity) for each video and for each text.
        siblings: (B, B) bool, pairs of one minimal-pair group; true ones among them are ignored.
        num_siblings: Further negatives drawn from ``siblings`` alone.
        generator: CPU source of randomness; equal in every process, so that all choose the same pairs.

    Returns:
        The true pairs (i, i) first, then negative videos of each text, then negative texts of each video:
        3 B pairs with one negative each and nothing left out.

    Raises:
        ValueError: The matrices are not square or differ in shape, or a diagonal pair is not true.
    """
    size = len(similarity)
    if similarity.shape != (size, size) or positives.shape != (size, size):
        shapes = f"{tuple(similarity.shape)} and {tuple(positives.shape)}"
        raise ValueError(f"similarity and positives must be square and equal in shape, got {shapes}")
    if not bool(positives.diagonal().all()):
        raise ValueError("positives must be true on the diagonal: text i belongs to video i")
    own = torch.arange(size, device=similarity.device)
    videos, texts = [own], [own]
    allowed = [(positives, num_negatives)]
    if siblings is not None and num_siblings:
        allowed.append((positives | ~siblings, num_siblings))
    for excluded, num in allowed:
        row, column = draw_negatives(negative_weights(similarity.T, excluded.T), num, generator)
        videos.append(column)
        texts.append(row)
        row, column = draw_negatives(negative_weights(similarity, excluded), num, generator)
        videos.append(row)
        texts.append(column)
    video, text = torch.cat(videos), torch.cat(texts)
    label = torch.zeros_like(video)
    label[:size] = 1
    return Pairs(video, text, label)


def matching_loss(logits: Tensor, label: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Return the cross-entropy of (pairs, 2) logits, index 1 = match.

    Args:
        logits: (pairs, 2).
        label: (pairs,) int64, 1 = the pair is true.
        total: Divisor; the number of pairs if None. With several processes, pairs of all over their number.
    """
    loss = F.cross_entropy(logits.float(), label, reduction="sum")
    return loss / (max(len(label), 1) if total is None else total)
