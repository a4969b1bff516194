"""Segments into vectors and, for reranking, token features: what the model says, made small for the disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlm.data.frame_sampling import grid_step
from vlm.errors import CapabilityError
from vlm.retrieval.vector_log import TokenBlock, quantise
from vlm.types import VideoTextEncoder

StoreTokens = Literal["none", "pooled", "full"]
MAX_TOKEN_BYTES_PER_SECOND = 60_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureLayout:
    """What an index stores of each segment; fixed when the index is made.

    Attributes:
        dim: Length of a vector.
        store_tokens: Nothing, spatially pooled int8, or everything as float16.
        token_pool: Side of the square of tokens that is averaged into one; 1 if not pooled.
        num_tokens: Tokens stored for a segment.
        token_dim: Their width.
    """

    dim: int
    store_tokens: StoreTokens
    token_pool: int
    num_tokens: int
    token_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of token features for a segment."""
        if self.store_tokens == "none":
            return 0
        size = 2 * self.token_dim if self.store_tokens == "full" else self.token_dim + 2
        return self.num_tokens * size


def choose_layout(
    model: VideoTextEncoder, store_tokens: StoreTokens | None, stride_s: float
) -> FeatureLayout:
    """Ask the model for the shapes of its features and decide what to store of them.

    Args:
        model: The encoder; one blank clip is encoded.
        store_tokens: None stores pooled tokens if the model can rerank, else none.
        stride_s: Seconds from one segment to the next; pooled tokens take at most 60 kB for each.

    Raises:
        CapabilityError: Tokens were asked for, but the model has no matching head to read them.
    """
    if "search" not in model.capabilities:
        raise CapabilityError(
            f"model {model.name!r} ({model.kind}) cannot search: it has no embedding shared by video and text"
        )
    can_rerank = "rerank" in model.capabilities
    if store_tokens is None:
        store_tokens = "pooled" if can_rerank else "none"
    if store_tokens != "none" and not can_rerank:
        raise CapabilityError(
            f"model {model.name!r} ({model.kind}) cannot rerank, so stored tokens would be of no use: "
            "use --store-tokens none"
        )
    size = model.preprocessing.image_size
    blank = np.zeros((1, model.preprocessing.num_frames, 3, size, size), np.float32)
    embedding, tokens, num_frames = _encode(model, blank)
    dim = embedding.shape[1]
    if store_tokens == "none":
        return FeatureLayout(dim=dim, store_tokens="none", token_pool=1, num_tokens=0, token_dim=0)
    _, num_tokens, token_dim = tokens.shape
    if store_tokens == "full":
        return FeatureLayout(
            dim=dim, store_tokens="full", token_pool=1, num_tokens=num_tokens, token_dim=token_dim
        )
    side = math.isqrt(num_tokens // num_frames)
    pool = min(2, side)
    while pool < side:
        stored = num_frames * math.ceil(side / pool) ** 2
        if stored * (token_dim + 2) <= MAX_TOKEN_BYTES_PER_SECOND * stride_s:
            break
        pool += 1
    stored = pool_tokens(tokens, num_frames, pool).shape[1]
    return FeatureLayout(
        dim=dim, store_tokens="pooled", token_pool=pool, num_tokens=stored, token_dim=token_dim
    )


def choose_grid(
    model: VideoTextEncoder, layout: FeatureLayout, segment_s: float, stride_s: float
) -> float | None:
    """Return how many seconds apart frames are taken from a whole video; None if each segment has its own.

    A model that sees frames one by one can then encode each of them once, however many segments show it. One
    that sees them together cannot, nor can tokens of a segment be put together.

    Args:
        model: The encoder.
        layout: What is stored of a segment.
        segment_s: Length of a segment, in seconds.
        stride_s: From one segment's start to the next, in seconds.
    """
    if model.kind != "frames" or layout.store_tokens != "none":
        return None
    return grid_step(segment_s, stride_s, model.preprocessing.num_frames)


def encode_frames(model: VideoTextEncoder, frames: Sequence[np.ndarray]) -> np.ndarray:
    """Encode preprocessed frames, each (3, height, width) float32, one by one.

    Returns:
        (frames, dim) float32; the vector of a segment is the mean of its frames'.
    """
    return _encode(model, np.stack(frames)[:, None])[0]


def encode_segments(
    model: VideoTextEncoder, clips: Sequence[np.ndarray], layout: FeatureLayout
) -> tuple[np.ndarray, TokenBlock | None]:
    """Encode a batch of preprocessed segments, each (frames, 3, height, width) float32.

    Returns:
        Vectors (segments, dim) float16, not normalised: their inner product with a text is its score; and
        the token features that `layout` keeps, or None.
    """
    embedding, tokens, num_frames = _encode(model, np.stack(clips))
    vectors = embedding.astype(np.float16)
    if layout.store_tokens == "none":
        return vectors, None
    if layout.store_tokens == "full":
        return vectors, TokenBlock(values=tokens.astype(np.float16))
    return vectors, quantise(pool_tokens(tokens, num_frames, layout.token_pool))


def pool_tokens(tokens: np.ndarray, num_frames: int, pool: int) -> np.ndarray:
    """Average squares of `pool` x `pool` neighbouring tokens within each frame.

    Args:
        tokens: (batch, frames * side * side, dim), row by row within a frame.
        num_frames: Time steps among the tokens.
        pool: Side of the square; incomplete squares at the far edges average what they have.

    Returns:
        (batch, frames * ceil(side / pool) ** 2, dim) float32; unchanged if the tokens form no square grid.
    """
    batch, num_tokens, dim = tokens.shape
    side = math.isqrt(num_tokens // max(num_frames, 1))
    if pool <= 1 or num_frames * side * side != num_tokens:
        return tokens.astype(np.float32)
    grid = tokens.astype(np.float32).reshape(batch, num_frames, side, side, dim)
    starts = np.arange(0, side, pool)
    counts = np.minimum(starts + pool, side) - starts
    summed = np.add.reduceat(np.add.reduceat(grid, starts, axis=2), starts, axis=3)
    means = summed / np.outer(counts, counts)[None, None, :, :, None].astype(np.float32)
    return means.reshape(batch, -1, dim)


def _encode(model: VideoTextEncoder, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return embeddings (b, e) and tokens (b, n, d) as float32, and how many time steps the tokens have."""
    import torch

    with torch.inference_mode():
        video = torch.from_numpy(clips).to(device=model.device)
        features = model.encode_video(video)
    embedding = features.embedding.float().cpu().numpy()
    tokens = features.tokens.float().cpu().numpy()
    return embedding, tokens, int(features.pooled.shape[1])
