"""Random changes of colour and shape, a few at once, and a random hole: the augmentation of classifiers.

What is drawn is drawn once a clip, and statistics are the clip's, so that nothing flickers.

Source: Cubuk et al. 2020, RandAugment; the fifteen operations and their strengths are those of timm's
``rand-mM-nN-mstdS-inc1``, each left out half of the time. Zhong et al. 2020, Random Erasing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.types import Preprocessing

LARGEST_MAGNITUDE = 10.0
_FILL = (124.0, 116.0, 104.0)  # what comes in from outside: the mean picture
_CHANCE = 0.5
_ATTEMPTS = 10


def apply_operations(
    clip: Tensor, number: int, magnitude: float, spread: float, rng: np.random.Generator
) -> Tensor:
    """Apply randomly chosen operations one after the other.

    Args:
        clip: (t, 3, h, w) uint8.
        number: How many are chosen, with repeats; each is then left out with a chance of one half.
        magnitude: Mean strength, 0 to 10.
        spread: Standard deviation of the strength, which stays within 0 to 10.
        rng: Source of randomness.

    Returns:
        (t, 3, h, w) uint8.
    """
    names = list(OPERATIONS)
    for place in rng.integers(len(names), size=number):
        drawn = rng.normal(magnitude, spread), rng.random(), rng.random()
        if drawn[1] < _CHANCE:
            level = min(max(drawn[0], 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
            clip = OPERATIONS[names[place]](clip, level, 1.0 if drawn[2] < 0.5 else -1.0)
    return clip


def erase(clip: Tensor, p: Preprocessing, rng: np.random.Generator) -> Tensor:
    """Put noise in place of one random window, the same in every frame; the clip itself is not changed.

    Args:
        clip: (t, 3, h, w) uint8.
        p: Its statistics are those of the noise.
        rng: Source of randomness.
    """
    frames, _, height, width = clip.shape
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = torch.from_numpy(rng.standard_normal((frames, 3, h, w), np.float32))
            mean, std = torch.tensor(p.mean).view(3, 1, 1), torch.tensor(p.std).view(3, 1, 1)
            erased = clip.clone()
            erased[:, :, top : top + h, left : left + w] = _rounded((mean + std * noise) * 255)
            return erased
    return clip


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _table(clip: Tensor, tables: Tensor) -> Tensor:
    """Replace every value by what its channel's table (3, 256) says."""
    channels = [table[clip[:, channel].long()] for channel, table in enumerate(tables)]
    return torch.stack(channels, dim=1)


def _stretch(clip: Tensor, _level: float, _sign: float) -> Tensor:
    """Make the darkest value of each channel 0 and the brightest 255."""
    low = clip.amin(dim=(0, 2, 3)).float()[:, None]
    high = clip.amax(dim=(0, 2, 3)).float()[:, None]
    steps = torch.arange(256.0)[None].expand(3, -1)
    return _table(clip, _rounded(torch.where(high > low, (steps - low) * 255 / (high - low), steps)))


def _equalise(clip: Tensor, _level: float, _sign: float) -> Tensor:
    """Make every brightness of a channel about equally frequent."""
    tables = []
    for channel in range(3):
        counts = torch.bincount(clip[:, channel].reshape(-1).long(), minlength=256)
        step = (int(counts.sum()) - int(counts[counts > 0][-1])) // 255
        if step == 0:
            tables.append(torch.arange(256))
        else:
            tables.append(((counts.cumsum(0) - counts + step // 2) // step).clamp(0, 255))
    return _table(clip, torch.stack(tables).to(torch.uint8))


def _invert(clip: Tensor, _level: float, _sign: float) -> Tensor:
    return 255 - clip


def _posterise(clip: Tensor, level: float, _sign: float) -> Tensor:
    bits = 4 - int(level * 4)
    kept: Tensor = clip & (256 - 2 ** (8 - bits) & 255)
    return kept


def _solarise(clip: Tensor, level: float, _sign: float) -> Tensor:
    return torch.where(clip.int() >= 256 - int(level * 256), 255 - clip, clip)


def _lighten_dark(clip: Tensor, level: float, _sign: float) -> Tensor:
    lighter = (clip.int() + int(level * 110)).clamp(max=255).to(torch.uint8)
    return torch.where(clip < 128, lighter, clip)


def _blend(clip: Tensor, plain: Tensor, level: float, sign: float) -> Tensor:
    return _rounded(plain + (1 + sign * 0.9 * level) * (clip.float() - plain))


def _grey(clip: Tensor) -> Tensor:
    weights = torch.tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
    return (clip.float() * weights).sum(dim=1, keepdim=True)


def _saturate(clip: Tensor, level: float, sign: float) -> Tensor:
    return _blend(clip, _grey(clip), level, sign)


def _contrast(clip: Tensor, level: float, sign: float) -> Tensor:
    return _blend(clip, _grey(clip).mean(), level, sign)


def _brighten(clip: Tensor, level: float, sign: float) -> Tensor:
    return _blend(clip, torch.zeros(()), level, sign)


def _sharpen(clip: Tensor, level: float, sign: float) -> Tensor:
    kernel = torch.ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = clip.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(smooth, kernel / kernel[0].sum(), groups=3)
    return _blend(clip, smooth, level, sign)


def _move(clip: Tensor, matrix: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Tensor:
    """Show at each place what the matrix, in units of half a side from the centre, points to."""
    fill = torch.tensor(_FILL).view(3, 1, 1)
    theta = torch.tensor(matrix)[None].expand(len(clip), -1, -1)
    grid = F.affine_grid(theta, list(clip.shape), align_corners=False)
    return _rounded(F.grid_sample(clip.float() - fill, grid, align_corners=False) + fill)


def _rotate(clip: Tensor, level: float, sign: float) -> Tensor:
    angle = sign * math.radians(30 * level)
    ratio = clip.shape[2] / clip.shape[3]
    cos, sin = math.cos(angle), math.sin(angle)
    return _move(clip, ((cos, sin * ratio, 0.0), (-sin / ratio, cos, 0.0)))


def _shear_x(clip: Tensor, level: float, sign: float) -> Tensor:
    return _move(clip, ((1.0, sign * 0.3 * level, 0.0), (0.0, 1.0, 0.0)))


def _shear_y(clip: Tensor, level: float, sign: float) -> Tensor:
    return _move(clip, ((1.0, 0.0, 0.0), (sign * 0.3 * level, 1.0, 0.0)))


def _shift_x(clip: Tensor, level: float, sign: float) -> Tensor:
    return _move(clip, ((1.0, 0.0, sign * 0.9 * level), (0.0, 1.0, 0.0)))


def _shift_y(clip: Tensor, level: float, sign: float) -> Tensor:
    return _move(clip, ((1.0, 0.0, 0.0), (0.0, 1.0, sign * 0.9 * level)))


# (clip, strength in [0, 1], sign) -> clip
OPERATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "stretch": _stretch,
    "equalise": _equalise,
    "invert": _invert,
    "rotate": _rotate,
    "posterise": _posterise,
    "solarise": _solarise,
    "lighten_dark": _lighten_dark,
    "saturate": _saturate,
    "contrast": _contrast,
    "brighten": _brighten,
    "sharpen": _sharpen,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "shift_x": _shift_x,
    "shift_y": _shift_y,
}
