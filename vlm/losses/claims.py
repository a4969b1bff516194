"""Learning from claims about videos: a true one is to find its videos, and to beat a false one.

Shapes: b videos of this process, B of the global batch, k claims about each, side by side, a true and a
false one in turn, e embedding.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vlm.distributed import all_sum, gather, rank, world_size
from vlm.losses.contrastive import contrastive_targets


def finding_loss(video: Tensor, text: Tensor, temperature: Tensor | float, positives: Tensor) -> Tensor:
    """Return the contrastive loss of texts over the videos of all processes: their mean.

    Claims that are true of no video of the batch find none and are left out.

    Args:
        video: (b, e) finished embeddings.
        text: (b k, e) of the claims.
        temperature: Positive scalar; gradients reach it.
        positives: (B, B k) bool: whether a claim is true of a video.

    Raises:
        ValueError: ``positives`` does not fit the batch.
    """
    expected = (len(video) * world_size(), len(text) * world_size())
    if tuple(positives.shape) != expected:
        raise ValueError(
            f"positives must be {expected}, a row a video, a column a claim, got {tuple(positives.shape)}"
        )
    own = positives[:, rank() * len(text) :][:, : len(text)].T
    known = own.any(dim=1)
    scores = (text @ gather(video).T / temperature).float()
    loss = -(F.log_softmax(scores[known], dim=1) * contrastive_targets(own[known])).sum()
    share = world_size() / all_sum(known.sum().double()).clamp_min(1)
    return loss * share.to(loss.dtype)


def telling_loss(logits: Tensor) -> Tensor:
    """Return the mean cross-entropy of which of two claims is true.

    Args:
        logits: (claims, 2) of the matching head, index 1 = match; rows come in pairs, the true one first.
    """
    right, wrong = rearrange(logits[:, 1] - logits[:, 0], "(p two) -> p two", two=2).float().unbind(1)
    return F.softplus(wrong - right).mean()
