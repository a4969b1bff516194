"""Frames into tokens: patches, the class token, the tables of space and time, and how tables are resized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vlm import distributed


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


class ConvolutionalStem(nn.Module):
    """Turn each frame into tokens by a few convolutions of stride 2 instead of one of stride ``patch_size``.

    A small model reads shapes with it that it does not learn from flat patches in reasonable time. Frames do
    not mix: whatever is said of motion, the blocks have found.

    Args:
        width: Channels of a token.
        patch_size: Pixels between two tokens, a power of two from 4.
        channels: Colour channels.

    Source: Xiao et al. 2021, Early Convolutions Help Transformers See Better, section 4.
    """

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        layers: list[nn.Module] = []
        before = channels
        for step in range(num_halvings):
            after = width * (step + 1) // num_halvings
            layers.append(StemLayer(before, after, stride=2))
            if 0 < step < num_halvings - 1:
                layers.append(StemLayer(after, after, stride=1))
            before = after
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, video: Tensor) -> Tensor:
        """Return (b, t, patches, width) of a (b, t, channels, h, w) video, row by row."""
        frames = rearrange(video.to(self.proj.weight.dtype), "b t c h w -> (b t) c h w")
        maps: Tensor = self.proj(self.layers(frames.contiguous(memory_format=torch.channels_last)))
        tokens: Tensor = rearrange(maps, "(b t) d h w -> b t (h w) d", b=len(video))
        return tokens


class StemLayer(nn.Module):
    """Convolve, normalise over the batch, rectify."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm = SharedBatchNorm(after)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (n, after, h / stride, w / stride) of (n, before, h, w)."""
        return F.relu(self.norm(self.conv(maps)))


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of the global batch, on any device.

    Source: Ioffe and Szegedy 2015, Batch Normalization, algorithms 1 and 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, c, h, w) per channel; every process must hold equally many."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        values = input.float()
        own = torch.stack([values.mean(dim=(0, 2, 3)), values.square().mean(dim=(0, 2, 3))])
        mean, square = distributed.gather(own[None]).mean(dim=0)
        variance = (square - mean.square()).clamp_min(0.0)
        count = input.numel() // input.shape[1] * distributed.world_size()
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        normalised: Tensor = values * scale[:, None, None] + shift[:, None, None]
        return normalised.to(input.dtype)


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
