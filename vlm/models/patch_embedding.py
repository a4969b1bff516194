"""Frames into tokens: patches, the class token, the tables of space and time, and how tables are resized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Cut a video into tubelets of ``tubelet`` frames times a square patch and project each to a token."""

    def __init__(self, width: int, patch_size: int, tubelet: int, channels: int) -> None:
        super().__init__()
        kernel = (tubelet, patch_size, patch_size)
        self.proj = nn.Conv3d(channels, width, kernel_size=kernel, stride=kernel)

    def forward(self, video: Tensor) -> Tensor:
        """Return (b, t/tubelet, patches, width) of a (b, t, channels, h, w) video, row by row.

        A single frame is repeated to fill a tubelet: a picture is a clip in which nothing moves.
        """
        tubelet = self.proj.kernel_size[0]
        if video.shape[1] == 1 and tubelet > 1:
            video = repeat(video, "b 1 c h w -> b t c h w", t=tubelet)
        frames = rearrange(video.to(self.proj.weight.dtype), "b t c h w -> b c t h w")
        tokens: Tensor = rearrange(self.proj(frames), "b d t h w -> b t (h w) d")
        return tokens


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize a table of positions (1, 1 + side*side, d), class token first, to (1, 1 + grid*grid, d).

    Bicubic, without antialiasing, as the reference does it when shrinking too.

    Raises:
        ValueError: The table is not that of a square.
    """
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise ValueError(
            f"expected 1 + side*side positions, got {table.shape[1]}; only squares can be resized"
        )
    if side == grid:
        return table
    space = rearrange(table[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    space = F.interpolate(space, size=(grid, grid), mode="bicubic", align_corners=False)
    resized = torch.cat([table[:, :1].float(), rearrange(space, "1 d h w -> 1 (h w) d")], dim=1)
    return resized.to(table.dtype)


def resize_times(table: Tensor, num_steps: int) -> Tensor:
    """Resize a table of times (1, steps, d) linearly to (1, num_steps, d)."""
    if table.shape[1] == num_steps:
        return table
    times = rearrange(table.float(), "1 t d -> 1 d t")
    times = F.interpolate(times, size=num_steps, mode="linear", align_corners=False)
    return times.transpose(1, 2).to(table.dtype)


def inflate_patches(weight: Tensor, tubelet: int, *, mode: str = "center") -> Tensor:
    """Turn the patch weights of an image model (d, c, h, w) into those of tubelets (d, c, tubelet, h, w).

    Args:
        weight: The two-dimensional kernel.
        tubelet: Frames in a tubelet.
        mode: ``center`` puts the kernel on the middle frame and zeros elsewhere; ``mean`` spreads it evenly.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode == "mean":
        spread: Tensor = repeat(weight / tubelet, "d c h w -> d c t h w", t=tubelet)
        return spread.contiguous()
    if mode != "center":
        raise ValueError(f"mode must be 'center' or 'mean', got {mode!r}")
    inflated = weight.new_zeros(*weight.shape[:2], tubelet, *weight.shape[2:])
    inflated[:, :, tubelet // 2] = weight
    return inflated


def sinusoid_table(num_positions: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the fixed sine and cosine table (1, num_positions, width) of the token-alignment branch.

    Source: Vaswani et al. 2017, Attention Is All You Need, section 3.5.
    """
    pair = torch.arange(width, device=device, dtype=torch.float64) // 2
    position = torch.arange(num_positions, device=device, dtype=torch.float64)
    angle = position[:, None] / 10000.0 ** (2 * pair / width)
    even = torch.arange(width, device=device) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()[None]
