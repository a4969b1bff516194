"""Video-text contrastive learning: similarities of normalised frames, soft targets from true pairs.

Shapes: b rows of this process, B rows of the global batch, t frames, e embedding.
Source: Li et al. 2024, VideoMamba, section 3.4 (after CLIP and ALBEF).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.distributed import gather, gather_local_gradient, rank, world_size

GatherMode = Literal["gradient", "local_gradient", "none"]


def mean_embedding(projection: Tensor) -> Tensor:
    """Normalise each frame's projection and average over frames: (b, t, e) or (b, e) to (b, e), in fp32.

    The mean is not normalised again, so its inner product with a normalised text is the mean cosine.
    """
    unit = F.normalize(projection.float(), dim=-1)
    return unit.mean(dim=1) if unit.ndim == 3 else unit


def similarity(
    video: Tensor, text: Tensor, temperature: Tensor | float = 1.0, aggregate: Literal["mean", "max"] = "mean"
) -> Tensor:
    """Return (videos, texts) fp32 similarities of un-normalised projections, divided by the temperature.

    Args:
        video: (videos, t, e), or (videos, e).
        text: (texts, e), or (texts, t, e) for several vectors a text.
        temperature: Positive divisor.
        aggregate: Whether the mean or the best vector of an item counts.
    """
    if aggregate == "mean":
        return mean_embedding(video) @ mean_embedding(text).T / temperature
    frames = F.normalize(video.float().reshape(video.shape[0], -1, video.shape[-1]), dim=-1)
    words = F.normalize(text.float().reshape(text.shape[0], -1, text.shape[-1]), dim=-1)
    cosines = torch.einsum("vfe,twe->vtfw", frames, words)
    return cosines.amax(dim=(2, 3)) / temperature


def contrastive_targets(positives: Tensor) -> Tensor:
    """Share a row's probability equally among its true partners: (rows, B) bool to (rows, B) fp32.

    With ``positives`` from equal identifiers this is the published rule.

    Raises:
        ValueError: A row has no true partner.
    """
    counts = positives.sum(dim=1, keepdim=True)
    if bool((counts == 0).any()):
        row = int((counts[:, 0] == 0).nonzero()[0])
        raise ValueError(f"row {row} of positives has no true partner; an item must at least match its own")
    return positives.float() / counts


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over rows of the cross-entropy between ``targets`` and softmax of ``logits``."""
    return -(F.log_softmax(logits.float(), dim=1) * targets).sum(dim=1).mean()


def contrastive_loss(
    video: Tensor,
    text: Tensor,
    temperature: Tensor | float,
    positives: Tensor,
    *,
    mode: GatherMode = "gradient",
) -> Tensor:
    """Return the mean of the video-to-text and text-to-video cross-entropies over the global batch.

    Args:
        video: (b, t, e) or (b, e) projections, normalised here per frame. An embedding that is already the
            mean of unit frames is taken as it is by ``embedding_contrastive_loss``.
        text: (b, e) projections.
        temperature: Positive scalar; gradients reach it.
        positives: (B, B) bool; ``positives[i, j]`` = text j is true of video i. Rows are videos.
        mode: ``gradient`` gathers over processes with the true gradient; ``local_gradient`` is the published
            code's gather, whose gradient is world_size times too small; ``none`` uses this process's rows.

    Raises:
        ValueError: ``positives`` does not fit the batch, or a row or column of it is empty.
    """
    return embedding_contrastive_loss(
        mean_embedding(video), mean_embedding(text), temperature, positives, mode=mode
    )


def embedding_contrastive_loss(
    video: Tensor,
    text: Tensor,
    temperature: Tensor | float,
    positives: Tensor,
    *,
    mode: GatherMode = "gradient",
) -> Tensor:
    """Return ``contrastive_loss`` for finished embeddings (b, e): inner products, no normalisation."""
    start, rows = (rank() * len(video), len(video)) if mode != "none" else (0, len(video))
    if mode == "none" and world_size() > 1:
        offset = rank() * rows
        positives = positives[offset : offset + rows, offset : offset + rows]
    total = rows * (world_size() if mode != "none" else 1)
    if tuple(positives.shape) != (total, total):
        raise ValueError(f"positives must be ({total}, {total}), a row a video, got {tuple(positives.shape)}")
    own = slice(start, start + rows)
    if mode == "gradient":
        videos, texts = gather(video), gather(text)
    elif mode == "local_gradient":
        videos, texts = gather_local_gradient(video), gather_local_gradient(text)
        video, text, own = videos, texts, slice(0, total)
    else:
        videos, texts = video, text
    to_text = soft_cross_entropy(video @ texts.T / temperature, contrastive_targets(positives[own]))
    to_video = soft_cross_entropy(text @ videos.T / temperature, contrastive_targets(positives.T[own]))
    return (to_text + to_video) / 2
