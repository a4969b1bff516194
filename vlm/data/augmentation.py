"""Random changes of training clips, and the counter-based randomness behind every draw of the data path."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm.data.preprocessing import channels_first, resize
from vlm.data.random_operations import LARGEST_MAGNITUDE, apply_operations, erase
from vlm.types import Preprocessing

_ATTEMPTS = 10
_SIDE = re.compile(r"(?<![a-z])(left|right)(most|wards?|hand(ed)?)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """How a training clip may differ from its file; every frame of a clip is changed alike.

    Attributes:
        min_scale: Smallest share of the picture's area that a crop keeps, in (0, 1].
        max_aspect: The crop's width / height lies in [1 / max_aspect, max_aspect] of a square.
        flip: Chance of mirroring left and right, for clips of which nothing says "left" or "right".
        brightness: Largest relative change of brightness, in [0, 1); 0 = off.
        contrast: Largest relative change of contrast, in [0, 1); 0 = off.
        operations: Random operations on colours and shape, see ``vlm.data.random_operations``; 0 = off.
        magnitude: Their mean strength, 0 to 10.
        magnitude_std: Spread of their strength.
        erase: Chance that a random window is replaced by noise.
    """

    min_scale: float = 0.5
    max_aspect: float = 4 / 3
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    operations: int = 0
    magnitude: float = 7.0
    magnitude_std: float = 0.5
    erase: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1 or self.max_aspect < 1:
            raise ValueError("expected 0 < min_scale <= 1 and max_aspect >= 1")
        if not (0 <= self.flip <= 1 and 0 <= self.brightness < 1 and 0 <= self.contrast < 1):
            raise ValueError("expected flip in [0, 1], brightness and contrast in [0, 1)")
        if self.operations < 0 or not 0 <= self.magnitude <= LARGEST_MAGNITUDE or self.magnitude_std < 0:
            raise ValueError("expected operations >= 0, magnitude in [0, 10] and magnitude_std >= 0")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"expected erase in [0, 1], got {self.erase}")


def counter_bits(seed: int, epoch: int, position: int, purpose: int, stream: int = 0) -> np.random.Philox:
    """Return the bit generator that belongs to these numbers alone, whatever was drawn before.

    Its raw output is the same in every version of NumPy, on every machine.
    """
    mask = (1 << 64) - 1
    return np.random.Philox(counter=[0, position, epoch, purpose], key=[seed & mask, stream & mask])


def sample_rng(seed: int, epoch: int, position: int, corpus: int = 0) -> np.random.Generator:
    """Return the generator of the sample at a position of a corpus's epoch, equal for any split."""
    return np.random.Generator(counter_bits(seed, epoch, position, purpose=1, stream=corpus))


def names_side(text: str) -> bool:
    """Return whether a text says left or right, and so is false of a mirrored clip.

    >>> names_side("The left-most of two cars"), names_side("a bright cleft")
    (True, False)
    """
    return _SIDE.search(text) is not None


def augment(
    frames: npt.NDArray[np.uint8], p: Preprocessing, config: AugmentationConfig, rng: np.random.Generator
) -> Tensor:
    """Crop one random window from all frames of a clip, resize it to the input size, and change it.

    Args:
        frames: (t, h, w, 3) uint8 RGB.
        p: Size and kernel of the resize.
        config: What may change.
        rng: Source of randomness.

    Returns:
        (t, 3, s, s) uint8.

    Raises:
        ValueError: ``frames`` has another shape or type.

    Source: Szegedy et al. 2015, Going Deeper with Convolutions, section 6 (area and aspect sampling).
    """
    images = channels_first(frames)
    top, left, height, width = _window(images.shape[2], images.shape[3], config, rng)
    crop = images[:, :, top : top + height, left : left + width]
    clip = resize(crop, p.image_size, p.image_size, kernel=p.resize, antialias=p.antialias)
    if config.operations:
        clip = apply_operations(clip, config.operations, config.magnitude, config.magnitude_std, rng)
    if config.flip and rng.random() < config.flip:
        clip = clip.flip(3)
    if config.brightness or config.contrast:
        clip = _jitter(clip, config, rng)
    if config.erase and rng.random() < config.erase:
        clip = erase(clip, p, rng)
    return clip


def _window(
    height: int, width: int, config: AugmentationConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the crop; the largest central one if no draw fits."""
    limit = math.log(config.max_aspect)
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(config.min_scale, 1.0)
        aspect = math.exp(rng.uniform(-limit, limit))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, round(width * config.max_aspect))
    w = min(width, round(height * config.max_aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def _jitter(clip: Tensor, config: AugmentationConfig, rng: np.random.Generator) -> Tensor:
    values = clip.float() * float(1 + rng.uniform(-config.brightness, config.brightness))
    mean = values.mean()
    values = (values - mean) * float(1 + rng.uniform(-config.contrast, config.contrast)) + mean
    return values.round_().clamp_(0, 255).to(torch.uint8)
