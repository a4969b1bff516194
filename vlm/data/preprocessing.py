"""Frames as decoded into the tensor that an encoder takes: resize, crop, normalise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.types import Preprocessing

_KERNELS = ("bicubic", "bilinear")


def preprocess(frames: npt.NDArray[np.uint8] | Tensor, p: Preprocessing) -> Tensor:
    """Resize, crop and normalise the frames of one clip.

    Args:
        frames: (t, h, w, 3) uint8 RGB.
        p: Size, kernel, aspect and statistics.

    Returns:
        (t, 3, s, s) float32, contiguous.

    Raises:
        ValueError: ``frames`` has another shape or type, or the kernel is unknown.

    Source: VideoMamba (Li et al. 2024), released evaluation protocol: bicubic on uint8 without low-pass
        filter, rounded back to uint8, then scaled to [0, 1] and standardised.
    """
    return normalise(fit(frames, p), p)


def fit(frames: npt.NDArray[np.uint8] | Tensor, p: Preprocessing) -> Tensor:
    """Resize and crop (t, h, w, 3) uint8 to (t, 3, s, s) uint8: `preprocess` without the normalisation.

    Raises:
        ValueError: ``frames`` has another shape or type, or the kernel is unknown.
    """
    images = channels_first(frames)
    height, width = images.shape[2:]
    size = p.image_size
    if p.keep_aspect:
        short, long = min(height, width), max(height, width)
        stretched = int(size * long / short)
        height, width = (size, stretched) if height <= width else (stretched, size)
    else:
        height = width = size
    images = resize(images, height, width, kernel=p.resize, antialias=p.antialias)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, :, top : top + size, left : left + size]


def fit_crops(frames: npt.NDArray[np.uint8] | Tensor, p: Preprocessing, number: int) -> Tensor:
    """Resize the short side to the input size and cut squares evenly along the long side; one in the middle.

    Args:
        frames: (t, h, w, 3) uint8.
        p: Size and kernel; the aspect is kept whatever it says.
        number: Of the squares; at least 1.

    Returns:
        (number, t, 3, s, s) uint8, from left to right or from top to bottom.

    Raises:
        ValueError: ``frames`` has another shape or type, the kernel is unknown, or ``number`` is below 1.

    Source: VideoMamba (Li et al. 2024), released testing protocol.
    """
    if number < 1:
        raise ValueError(f"expected at least 1 crop, got {number}")
    images = channels_first(frames)
    height, width = images.shape[2:]
    size, is_wide = p.image_size, width >= height
    stretched = int(size * max(height, width) / min(height, width))
    shape = (size, stretched) if is_wide else (stretched, size)
    images = resize(images, *shape, kernel=p.resize, antialias=p.antialias)
    spare = stretched - size
    starts = [spare // 2] if number == 1 else [int(place * spare / (number - 1)) for place in range(number)]
    dim = 3 if is_wide else 2
    return torch.stack([images.narrow(dim, start, size) for start in starts])


def channels_first(frames: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """Return (t, h, w, 3) uint8 as a (t, 3, h, w) tensor on the same memory where possible.

    Raises:
        ValueError: ``frames`` has another shape or type.
    """
    if isinstance(frames, np.ndarray) and not frames.flags.writeable:
        frames = frames.copy()  # torch refuses to look at memory that it may not write
    pixels = torch.as_tensor(frames)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(f"expected uint8 frames (t, h, w, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    return pixels.permute(0, 3, 1, 2)


def resize(images: Tensor, height: int, width: int, *, kernel: str, antialias: bool) -> Tensor:
    """Resize (t, 3, h, w) uint8 to (t, 3, height, width) uint8, rounding half to even and clamping.

    Raises:
        ValueError: The kernel is neither ``bicubic`` nor ``bilinear``.
    """
    if kernel not in _KERNELS:
        raise ValueError(f"resize must be one of {', '.join(_KERNELS)}, got {kernel!r}")
    if images.shape[2:] == (height, width):
        return images
    resized = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
    # frame by frame: a clip in float does not fit a processor's cache, which makes it three times slower
    for number, image in enumerate(images):
        values = F.interpolate(
            image[None].float(), (height, width), mode=kernel, align_corners=False, antialias=antialias
        )
        resized[number] = values[0].round_().clamp_(0, 255).to(torch.uint8)
    return resized


def normalise(images: Tensor, p: Preprocessing) -> Tensor:
    """Turn (..., 3, h, w) uint8 into contiguous float32: scale to [0, 1], subtract mean, divide by std."""
    mean = torch.tensor(p.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(p.std, device=images.device).view(3, 1, 1)
    return images.to(torch.float32).div_(255).sub_(mean).div_(std).contiguous()
