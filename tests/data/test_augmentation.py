"""Random changes against Pillow's operations, by hand, and by what must not change."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from vlm.data.augmentation import AugmentationConfig, augment
from vlm.data.random_operations import OPERATIONS, apply_operations, erase
from vlm.types import Preprocessing

P = Preprocessing(num_frames=3, image_size=24)


@pytest.fixture
def picture():
    rng = np.random.default_rng(3)
    smooth = np.linspace(20, 200, 24)[:, None, None] + rng.integers(-20, 30, (24, 24, 3))
    return smooth.clip(0, 255).astype(np.uint8)


def clip_of(*pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def enhanced(kind):
    return lambda image, level, sign: kind(image).enhance(1 + sign * 0.9 * level)


TRUTHS = {
    "stretch": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalise": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "posterise": lambda image, level, sign: ImageOps.posterize(image, 4 - int(level * 4)),
    "solarise": lambda image, level, sign: ImageOps.solarize(image, 256 - int(level * 256)),
    "saturate": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brighten": enhanced(ImageEnhance.Brightness),
    "sharpen": enhanced(ImageEnhance.Sharpness),
}


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize(("level", "sign"), [(0.7, 1.0), (0.3, -1.0), (0.0, 1.0)])
def test_colours_change_as_pillow_changes_them(picture, name, level, sign):
    found = OPERATIONS[name](clip_of(picture), level, sign)
    expected = clip_of(np.asarray(TRUTHS[name](Image.fromarray(picture), level, sign)))
    assert (found.int() - expected.int()).abs().max() <= 2  # Pillow rounds greys and blends on its way


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "shift_x", "shift_y"])
def test_shapes_move_as_pillow_moves_them_and_not_at_all_at_strength_0(picture, name):
    level, size = 0.5, 24
    moves = {
        "shear_x": (1, 0.15, -0.15 * size / 2, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.15, 1, -0.15 * size / 2),
        "shift_x": (1, 0, 0.225 * size, 0, 1, 0),
        "shift_y": (1, 0, 0, 0, 1, 0.225 * size),
    }
    image = Image.fromarray(picture)
    if name == "rotate":
        expected = image.rotate(-15, Image.Resampling.BILINEAR)
    else:
        expected = image.transform(
            (size, size), Image.Transform.AFFINE, moves[name], Image.Resampling.BILINEAR
        )
    found = OPERATIONS[name](clip_of(picture), level, 1.0)
    inner = (slice(None), slice(None), slice(7, 17), slice(7, 17))
    assert (found[inner].int() - clip_of(np.asarray(expected))[inner].int()).abs().max() <= 2
    assert torch.equal(OPERATIONS[name](clip_of(picture), 0.0, 1.0), clip_of(picture))


def test_dark_values_are_lifted_and_bright_ones_kept():
    values = torch.tensor([0, 100, 127, 128, 250], dtype=torch.uint8).expand(1, 3, 1, 5)
    assert OPERATIONS["lighten_dark"](values, 0.5, 1.0)[0, 0, 0].tolist() == [55, 155, 182, 128, 250]


def test_every_frame_of_a_clip_changes_alike(picture):
    clip = clip_of(picture, picture, picture)
    for seed in range(40):
        changed = apply_operations(clip, 3, 9.0, 0.5, np.random.default_rng(seed))
        assert changed.dtype == torch.uint8 and changed.shape == clip.shape
        assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    again = apply_operations(clip, 3, 9.0, 0.5, np.random.default_rng(39))
    assert torch.equal(again, changed)


def test_half_of_the_operations_are_left_out(picture):
    clip = clip_of(picture)
    kept = sum(
        torch.equal(apply_operations(clip, 1, 9.0, 0.0, np.random.default_rng(seed)), clip)
        for seed in range(400)
    )
    assert 160 < kept < 240  # 200 expected, four standard deviations are 40


def test_a_window_becomes_noise_in_every_frame_and_the_rest_stays(picture):
    clip = clip_of(picture, picture, picture)
    before = clip.clone()
    for seed in range(20):
        erased = erase(clip, P, np.random.default_rng(seed))
        changed = (erased != clip).any(dim=1)
        rows, columns = changed.any(0).any(1).nonzero(), changed.any(0).any(0).nonzero()
        area = int((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1))
        assert 0.01 * 576 < area <= 0.4 * 576
        assert changed[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float().mean() > 0.9
    assert torch.equal(clip, before)


def test_what_is_not_asked_for_draws_nothing(picture):
    frames = np.stack([picture] * 3)
    plain = augment(frames, P, AugmentationConfig(flip=0.5), np.random.default_rng(1))
    off = AugmentationConfig(flip=0.5, operations=0, erase=0.0, magnitude=3.0)
    assert torch.equal(augment(frames, P, off, np.random.default_rng(1)), plain)
    on = AugmentationConfig(flip=0.5, operations=4, erase=1.0)
    assert not torch.equal(augment(frames, P, on, np.random.default_rng(1)), plain)


@pytest.mark.parametrize("wrong", [{"operations": -1}, {"magnitude": 11.0}, {"erase": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        AugmentationConfig(**wrong)
