"""Plain video transformers with VideoMamba's tokens, width and depth, to compare speed with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from vlm.models.patch_embedding import PatchEmbedding
from vlm.models.video_mamba import VideoMambaConfig

_HEAD_WIDTH = 64


class Attention(nn.Module):
    """Multi-head self-attention: PyTorch's fused kernel, or with the matrix of all pairs in memory."""

    def __init__(self, width: int, *, is_naive: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads(width)
        self.is_naive = is_naive
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix (b, n, d) along n."""
        heads = rearrange(self.qkv(tokens), "b n (part h c) -> part b h n c", part=3, h=self.num_heads)
        q, k, v = heads.unbind(0)
        if self.is_naive:
            mixed = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(rearrange(mixed, "b h n c -> b n (h c)"))
        return out


class Block(nn.Module):
    """A transformer block over space and time at once, or over time and then over space.

    Source: Bertasius et al. 2021, Is Space-Time Attention All You Need for Video Understanding?, section 3.
    """

    def __init__(self, width: int, architecture: str) -> None:
        super().__init__()
        is_divided = architecture == "divided"
        self.time_norm = nn.LayerNorm(width) if is_divided else None
        self.time = Attention(width) if is_divided else None
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, is_naive=architecture == "joint-naive")
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, num_frames: int) -> Tensor:
        """Mix (b, 1 + t n, d), the class token first."""
        if self.time is None:
            tokens = tokens + self.attention(self.norm(tokens))
        else:
            tokens = self._divided(tokens, num_frames)
        out: Tensor = tokens + self.mlp(tokens)
        return out

    def _divided(self, tokens: Tensor, num_frames: int) -> Tensor:
        assert self.time is not None and self.time_norm is not None
        first, patches = tokens[:, :1], tokens[:, 1:]
        by_place = rearrange(patches, "b (t n) d -> (b n) t d", t=num_frames)
        by_place = by_place + self.time(self.time_norm(by_place))
        by_frame = rearrange(by_place, "(b n) t d -> (b t) n d", b=len(tokens))
        # every frame sees the class token, which takes the mean of what it gets from the frames
        by_frame = torch.cat([repeat(first, "b 1 d -> (b t) 1 d", t=num_frames), by_frame], dim=1)
        by_frame = by_frame + self.attention(self.norm(by_frame))
        first = reduce(by_frame[:, :1], "(b t) 1 d -> b 1 d", "mean", t=num_frames)
        return torch.cat([first, rearrange(by_frame[:, 1:], "(b t) n d -> b (t n) d", t=num_frames)], dim=1)


class VideoTransformer(nn.Module):
    """A plain video transformer with VideoMamba's tokens, width and depth, for comparison only."""

    def __init__(self, config: VideoMambaConfig, architecture: str) -> None:
        super().__init__()
        width = config.width
        self.patch_embed = PatchEmbedding(width, config.patch_size, config.tubelet, config.channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1, config.grid**2, width))
        self.time_embed = nn.Parameter(torch.zeros(1, config.num_steps, 1, width))
        self.layers = nn.ModuleList(Block(width, architecture) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, video: Tensor) -> Tensor:
        """Return tokens (b, 1 + t n, d) of a video (b, t, channels, h, w)."""
        patches = self.patch_embed(video) + self.pos_embed + self.time_embed
        first = self.cls_token.expand(len(video), -1, -1)
        tokens = torch.cat([first, rearrange(patches, "b t n d -> b (t n) d")], dim=1)
        for block in self.layers:
            tokens = block(tokens, patches.shape[1])
        out: Tensor = self.norm(tokens)
        return out


def num_heads(width: int) -> int:
    """Return the heads of a transformer of that width, 64 channels each."""
    return max(1, width // _HEAD_WIDTH)


def naive_bytes(config: VideoMambaConfig, batch: int, dtype: torch.dtype) -> int:
    """Return the size of one block's scores and their softmax, which naive attention holds side by side."""
    length = 1 + config.num_steps * config.grid**2
    return 2 * batch * num_heads(config.width) * length**2 * dtype.itemsize
