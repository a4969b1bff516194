"""Scenes into pixels: only the frames that are asked for, all of them at once.

Every random quantity of a frame hangs on the frame's *stored* time, so a reversed clip holds exactly the
frames of the original, last one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.world.digits import load_digits
from vlm.world.motion import Motion, motion
from vlm.world.scene import COLOURS, LAST, NUM_FRAMES, SIDE, Distractor, Scene

Floats = npt.NDArray[np.float32]
Frames = npt.NDArray[np.int64]

_NUM_TEXTURES = 60
_NOISE_SIDE = 512


def sample_frames(num_frames: int) -> Frames:
    """Return the middles of equal spans of the clip: mirror-symmetric, so they commute with reversal.

    One frame is a picture, which no reversal changes the meaning of.

    Raises:
        ValueError: ``num_frames`` is not 1 and does not divide the clip into spans of odd length.
    """
    if num_frames == 1:
        return np.array([NUM_FRAMES // 2])
    span, rest = divmod(NUM_FRAMES, max(num_frames, 1))
    if num_frames < 1 or rest or span % 2 == 0:
        raise ValueError(
            f"expected num_frames with {NUM_FRAMES} / num_frames odd (8 or 40), or 1, got {num_frames}"
        )
    return np.arange(num_frames) * span + span // 2


def render(
    scene: Scene, frame_indices: Sequence[int] | Frames | None = None, size: int = SIDE
) -> npt.NDArray[np.uint8]:
    """Draw frames of a scene.

    Args:
        scene: What to draw.
        frame_indices: Frame numbers, 0 to 39; all 40 without it.
        size: Side of the picture in pixels, a multiple of 64.

    Returns:
        (t, size, size, 3) uint8, RGB.

    Raises:
        ValueError: ``size`` is not a multiple of 64 or a frame number is out of range.
    """
    frames = np.arange(NUM_FRAMES) if frame_indices is None else np.asarray(frame_indices, dtype=np.int64)
    if size % SIDE or size < SIDE:
        raise ValueError(f"expected a size that is a multiple of {SIDE}, got {size}")
    if frames.ndim != 1 or (frames.size and (frames.min() < 0 or frames.max() > LAST)):
        raise ValueError(f"expected frame numbers from 0 to {LAST}, got {frames.tolist()}")
    stored = LAST - frames if scene.reversed else frames
    scale = size // SIDE
    picture = _background(scene, stored, scale)
    for item in scene.distractors:
        if not item.in_front:
            _draw_distractor(picture, item, stored, scale)
    paths = motion(scene, frames)
    for index in range(len(scene.things)):
        _draw_thing(picture, scene, paths, index, scale)
    for item in scene.distractors:
        if item.in_front:
            _draw_distractor(picture, item, stored, scale)
    picture *= _gains(scene)[stored][:, None, None, None]
    _add_noise(picture, scene, stored)
    np.clip(picture, 0.0, 255.0, out=picture)
    picture += np.float32(0.5)
    return picture.astype(np.uint8)


def mix(*values: npt.NDArray[np.uint64] | int) -> npt.NDArray[np.uint64]:
    """Hash integers into 64 well-mixed bits (the finaliser of SplitMix64), elementwise."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = (state ^ np.asarray(value, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


@lru_cache(maxsize=128)
def texture(index: int, scale: int) -> Floats:
    """Return texture ``index`` twice over in both directions, (128 s, 128 s) float32 in [0, 1], periodic."""
    rng = np.random.Generator(np.random.Philox(key=1000 + index))
    side = SIDE * scale
    grid = np.arange(side) / side * 2 * np.pi
    y, x = grid[:, None], grid[None, :]
    family = index % 5 if index < _NUM_TEXTURES else 5 + index % 3
    if family == 0:  # stripes
        kx, ky = rng.integers(1, 5), rng.integers(-4, 5)
        picture = 0.5 + 0.5 * np.tanh(2 * np.sin(kx * x + ky * y + rng.random()))
    elif family == 1:  # checks
        k, m = rng.integers(2, 5), rng.integers(2, 5)
        picture = 0.5 + 0.5 * np.tanh(3 * np.sin(k * x + rng.random()) * np.sin(m * y + rng.random()))
    elif family == 2:  # dots
        k, m = rng.integers(3, 6), rng.integers(3, 6)
        picture = np.clip(np.cos(k * x) + np.cos(m * y + x * rng.integers(0, 2)) - 0.4, 0, None) / 1.6
    elif family == 3:  # clouds
        picture = _clouds(rng, x, y, 4)
    elif family == 4:  # a slope that closes on itself
        picture = _clouds(rng, x, y, 1)
    elif family == 5:  # bent bands
        k, m = rng.integers(2, 5), rng.integers(1, 4)
        picture = 0.5 + 0.5 * np.sin(k * y + 1.5 * np.sin(m * x + 6 * rng.random()))
    elif family == 6:  # a lattice of thin lines
        k, m = rng.integers(2, 5), rng.integers(2, 5)
        picture = np.maximum(np.cos(k * x) ** 16 + 0 * y, np.cos(m * y) ** 16)
    else:  # bricks, every other row shifted by half
        rows = int(rng.integers(2, 5))
        row = np.floor(y / (2 * np.pi) * 2 * rows)
        picture = 0.5 + 0.5 * np.tanh(6 * np.cos(rows * x + np.pi * (row % 2))) + 0 * y
    levels = np.rint(np.clip(picture, 0, 1) * 255) / 255
    return np.tile(levels, (2, 2)).astype(np.float32)


def _clouds(
    rng: np.random.Generator, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], finest: int
) -> npt.NDArray[np.float64]:
    total = np.zeros((y.shape[0], x.shape[1]))
    for kx in range(-finest, finest + 1):
        for ky in range(finest + 1):
            if kx or ky:
                weight = rng.normal() / np.hypot(kx, ky)
                total += weight * np.cos(kx * x + ky * y + 2 * np.pi * rng.random())
    lifted: npt.NDArray[np.float64] = (total - total.min()) / (total.max() - total.min())
    return lifted


def _background(scene: Scene, stored: Frames, scale: int) -> Floats:
    ground = scene.background
    side = SIDE * scale
    tile = texture(ground.texture, scale)
    tile = ground.base + ground.contrast * tile
    coloured = np.empty((*tile.shape, 3), dtype=np.float32)
    for channel in range(3):
        coloured[:, :, channel] = tile * np.float32(ground.tint[channel])
    picture = np.empty((len(stored), side, side, 3), dtype=np.float32)
    left = np.rint((ground.x + ground.vx * stored) * scale).astype(np.int64) % side
    top = np.rint((ground.y + ground.vy * stored) * scale).astype(np.int64) % side
    for frame, (row, column) in enumerate(zip(top, left, strict=True)):
        picture[frame] = coloured[row : row + side, column : column + side]
    return picture


def _gains(scene: Scene) -> Floats:
    """Brightness walk: centred sums of independent steps, the same in distribution backwards."""
    steps = mix(scene.noise_seed, 1, np.arange(NUM_FRAMES, dtype=np.uint64)).astype(np.float64) / 2**64 - 0.5
    walk = np.cumsum(steps[1:] * 2, dtype=np.float64)
    walk = np.concatenate([[0.0], walk])
    walk -= walk.mean()
    return np.clip(1.0 + scene.brightness * walk, 0.75, 1.25).astype(np.float32)


@lru_cache(maxsize=1)
def _noise_bank() -> Floats:
    rng = np.random.Generator(np.random.Philox(key=77))
    return rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.float32)


def _add_noise(picture: Floats, scene: Scene, stored: Frames) -> None:
    """Add a window of the noise bank, drawn afresh for every frame, mirrored or not."""
    bank = _noise_bank()
    side = picture.shape[1]
    bits = mix(scene.noise_seed, 2, stored.astype(np.uint64))
    span = np.uint64(_NOISE_SIDE - side)
    rows = bits % span
    columns = (bits >> np.uint64(20)) % span
    strength = np.float32(scene.noise)
    for frame in range(len(stored)):
        row, column = int(rows[frame]), int(columns[frame])
        picture[frame] += strength * bank[row : row + side, column : column + side]


def _draw_thing(picture: Floats, scene: Scene, paths: Motion, index: int, scale: int) -> None:
    thing = scene.things[index]
    image = load_digits()[0][thing.image].astype(np.float32) / 16
    seen = np.flatnonzero(paths.visible[index])
    if not seen.size:
        return
    x, y, angle = paths.x[index, seen] * scale, paths.y[index, seen] * scale, paths.angle[index, seen]
    box = thing.size * scale
    turning = bool(np.any(np.abs(angle) > 1e-9))
    count = int(np.ceil(box * (1.42 if turning else 1.0))) + 2
    left, top = np.floor(x - count / 2).astype(np.int64), np.floor(y - count / 2).astype(np.int64)
    # sub-pixel places in 1/16: any rounding difference between machines is then far below one grey level
    across = np.arange(count)[None, :] + 0.5 - np.rint((x - left) * 16)[:, None] / 16
    down = np.arange(count)[None, :] + 0.5 - np.rint((y - top) * 16)[:, None] / 16
    ink = _turned(image, across, down, angle, box) if turning else _upright(image, across, down, box)
    _blend(picture, seen, top, left, ink, np.array(COLOURS[thing.colour], dtype=np.float32))


def _upright(
    image: Floats, across: npt.NDArray[np.float64], down: npt.NDArray[np.float64], box: float
) -> Floats:
    columns = _taps(across / box * 8 + 3.5)
    rows = _taps(down / box * 8 + 3.5)
    return _inked((rows @ image) @ columns.transpose(0, 2, 1))


def _turned(
    image: Floats,
    across: npt.NDArray[np.float64],
    down: npt.NDArray[np.float64],
    angle: npt.NDArray[np.float64],
    box: float,
) -> Floats:
    """Sample the digit turned clockwise by ``angle`` turns, from a copy enlarged six times."""
    fine = 6
    place = (np.arange(10 * fine) + 0.5) / fine - 1.5
    taps = _taps(place[None, :])[0]
    enlarged = taps @ image @ taps.T
    cosine, sine = np.cos(2 * np.pi * angle)[:, None, None], np.sin(2 * np.pi * angle)[:, None, None]
    u = (cosine * across[:, None, :] + sine * down[:, :, None]) / box * 8 + 3.5
    v = (cosine * down[:, :, None] - sine * across[:, None, :]) / box * 8 + 3.5
    last = 10 * fine - 1
    column = np.clip(np.rint((u + 1.5) * fine - 0.5), 0, last).astype(np.int64)
    row = np.clip(np.rint((v + 1.5) * fine - 0.5), 0, last).astype(np.int64)
    return _inked(enlarged[row, column])


def _taps(place: npt.NDArray[np.float64]) -> Floats:
    """Catmull-Rom weights (t, n, 8) of the 8 pixels of a digit at ``place`` (t, n), in digit pixels."""
    distance = np.abs(place[..., None] - np.arange(8))
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = np.where(distance < 2, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2, 0)
    weights: Floats = np.where(distance < 1, near, far).astype(np.float32)
    return weights


def _inked(smooth: npt.NDArray[np.floating[Any]]) -> Floats:
    """Sharpen the stroke's edge and quantise, so that machines cannot differ by a rounding."""
    ink: Floats = (np.rint(np.clip((smooth - 0.3) * 1.9, 0, 1) * 64) / 64).astype(np.float32)
    return ink


def _blend(
    picture: Floats,
    frames: npt.NDArray[np.intp],
    top: Frames,
    left: Frames,
    ink: Floats,
    colour: Floats,
) -> None:
    """Paint ``colour`` through ``ink`` (t, n, n) at rows ``top`` and columns ``left``, around the torus."""
    side = picture.shape[1]
    reach = np.arange(ink.shape[1])
    rows = (frames[:, None] * side + (top[:, None] + reach) % side) * side
    columns = (left[:, None] + reach) % side
    places = (rows[:, :, None] + columns[:, None, :]).ravel()
    strength = ink.ravel()
    inked = np.flatnonzero(strength)
    places, strength = places[inked], strength[inked]
    pixels = picture.reshape(-1, 3)
    for channel in range(3):
        plane = pixels[:, channel]
        under = plane[places]
        plane[places] = under + strength * (colour[channel] - under)


def _draw_distractor(picture: Floats, item: Distractor, stored: Frames, scale: int) -> None:
    x, y = (item.x + item.vx * stored) * scale, (item.y + item.vy * stored) * scale
    radius = item.size * scale / 2
    count = int(np.ceil(2 * radius)) + 2
    left, top = np.floor(x - count / 2).astype(np.int64), np.floor(y - count / 2).astype(np.int64)
    across = (np.arange(count)[None, :] + 0.5 - np.rint((x - left) * 16)[:, None] / 16)[:, None, :]
    down = (np.arange(count)[None, :] + 0.5 - np.rint((y - top) * 16)[:, None] / 16)[:, :, None]
    distance = np.maximum(np.abs(across), np.abs(down)) if item.shape == "square" else np.hypot(across, down)
    ink = np.clip(radius - distance, 0, 1)
    if item.shape == "ring":
        ink = ink * np.clip(distance - radius + 2.2 * scale, 0, 1)
    grey = np.full(3, item.grey, dtype=np.float32)
    quantised = (np.rint(ink * 64) / 64).astype(np.float32)
    _blend(picture, np.arange(len(stored)), top, left, quantised, grey)
