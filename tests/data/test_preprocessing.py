"""Resizing against an independent formula and against torchvision; normalising by hand; random crops."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from vlm.data import preprocess
from vlm.data.augmentation import AugmentationConfig, augment, sample_rng
from vlm.data.preprocessing import fit, fit_crops
from vlm.types import Preprocessing

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SIZES = [(90, 120), (67, 161), (32, 32), (20, 30), (224, 224), (256, 40)]


def clip(height: int, width: int, frames: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (frames, height, width, 3)).astype(np.uint8)
    smooth[:, : height // 2] = np.linspace(0, 255, width).astype(np.uint8)[None, None, :, None]
    return smooth


def cubic_weights(fraction: float, a: float = -0.75) -> list[float]:
    """Keys' kernel at distances 1 + f, f, 1 - f, 2 - f."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    return [kernel(1 + fraction), kernel(fraction), kernel(1 - fraction), kernel(2 - fraction)]


def cubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source): bicubic interpolation of one axis as a matrix; edges repeat; pixel centres align."""
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        first = int(np.floor(centre))
        for tap, weight in enumerate(cubic_weights(centre - first)):
            matrix[i, min(max(first - 1 + tap, 0), source - 1)] += weight
    return matrix


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_bicubic_equals_the_formula(height: int, width: int) -> None:
    frames = clip(height, width)
    got = fit(frames, Preprocessing(image_size=48)).numpy()
    rows, columns = cubic_matrix(height, 48), cubic_matrix(width, 48)
    exact = np.einsum("ah,thwc,bw->tcab", rows, frames.astype(np.float64), columns, optimize=True)
    # rounding to whole numbers: at most the halves may fall either way in fp32
    assert np.abs(got - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-3


def test_resized_values_are_whole_numbers_as_in_the_reference() -> None:
    p = Preprocessing(image_size=48, **PLAIN)
    values = preprocess(clip(90, 120), p) * 255
    assert (values - values.round()).abs().max() < 1e-4


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_torchvision(height: int, width: int, kernel: str, antialias: bool) -> None:
    """torchvision's resize of tensors, the one the reference results were made with."""
    functional = _torchvision_functional()
    frames = clip(height, width)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = functional.resize(tensor, [48, 48], interpolation=kernel, antialias=antialias)
    got = fit(frames, Preprocessing(image_size=48, resize=kernel, antialias=antialias))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("height", "width", "stretched"), [(90, 120, (48, 64)), (161, 67, (115, 48)), (50, 50, (48, 48))]
)
def test_keep_aspect_crops_the_centre(height: int, width: int, stretched: tuple[int, int]) -> None:
    frames = clip(height, width)
    got = fit(frames, Preprocessing(image_size=48, keep_aspect=True))
    rows, columns = cubic_matrix(height, stretched[0]), cubic_matrix(width, stretched[1])
    whole = np.einsum("ah,thwc,bw->tcab", rows, frames.astype(np.float64), columns, optimize=True).clip(
        0, 255
    )
    top, left = round((stretched[0] - 48) / 2), round((stretched[1] - 48) / 2)
    assert np.abs(got.numpy() - whole[:, :, top : top + 48, left : left + 48]).max() <= 0.5 + 1e-3


def test_normalisation_by_hand() -> None:
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    frames[..., 0], frames[..., 1], frames[..., 2] = 255, 51, 0
    p = Preprocessing(image_size=4, mean=(0.5, 0.2, 0.25), std=(0.5, 0.1, 0.125))
    got = preprocess(frames, p)
    assert got.shape == (1, 3, 4, 4)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    expected = torch.tensor([1.0, 0.0, -2.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert torch.allclose(got, expected, atol=1e-6)


def test_frames_are_independent() -> None:
    frames = clip(90, 120, frames=5)
    whole = preprocess(frames, Preprocessing(image_size=32))
    for number in range(5):
        alone = preprocess(frames[number : number + 1], Preprocessing(image_size=32))
        assert torch.equal(alone[0], whole[number])


def test_read_only_frames_are_left_alone() -> None:
    frames = clip(40, 40)
    frames.flags.writeable = False
    before = frames.copy()
    preprocess(frames, Preprocessing(image_size=16))
    assert np.array_equal(frames, before)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32)],
)
def test_wrong_frames(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8 frames"):
        preprocess(frames, Preprocessing())


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="bicubic, bilinear"):
        preprocess(clip(9, 9), Preprocessing(resize="lanczos"))


def test_random_crops_are_alike_in_all_frames_and_repeatable() -> None:
    frames = np.repeat(clip(90, 120, frames=1), 4, axis=0)
    p = Preprocessing(image_size=32)
    config = AugmentationConfig()
    first = augment(frames, p, config, sample_rng(1, 2, 3))
    assert first.shape == (4, 3, 32, 32)
    assert all(torch.equal(first[0], frame) for frame in first)
    assert torch.equal(first, augment(frames, p, config, sample_rng(1, 2, 3)))
    others = [augment(frames, p, config, sample_rng(*n)) for n in ((0, 2, 3), (1, 0, 3), (1, 2, 0))]
    assert all(not torch.equal(first, other) for other in others)


def test_crops_keep_left_and_right_and_cover_what_they_say() -> None:
    """A ramp from left to right: each crop rises to the right, and spans about the share asked for."""
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8)[None, None, :, None], (1, 100, 200, 3))
    widths = []
    for position in range(100):
        crop = augment(ramp, Preprocessing(image_size=16), AugmentationConfig(), sample_rng(0, 0, position))
        row = crop[0, 0, 8].int()
        assert row[-1] > row[0]
        widths.append(int(row[-1] - row[0]) / 255)
    # at least half of the area, so at least half of the height, in an aspect of at least 3/4
    assert 0.3 < min(widths) < 0.6
    assert max(widths) < 0.85


def test_whole_picture_when_nothing_may_change() -> None:
    frames = clip(60, 60)
    p = Preprocessing(image_size=24)
    config = AugmentationConfig(min_scale=1.0, max_aspect=1.0)
    assert torch.equal(augment(frames, p, config, sample_rng(0, 0, 0)), fit(frames, p))


def test_flip_and_jitter_on_demand() -> None:
    frames = clip(60, 60)
    p = Preprocessing(image_size=24)
    flipped = AugmentationConfig(min_scale=1.0, max_aspect=1.0, flip=1.0)
    assert torch.equal(augment(frames, p, flipped, sample_rng(0, 0, 0)), fit(frames, p).flip(3))
    jittered = AugmentationConfig(min_scale=1.0, max_aspect=1.0, brightness=0.4, contrast=0.4)
    changed = augment(frames, p, jittered, sample_rng(0, 0, 0))
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, fit(frames, p))


@pytest.mark.parametrize("wrong", [{"min_scale": 0.0}, {"max_aspect": 0.5}, {"flip": 2.0}, {"contrast": 1.0}])
def test_impossible_augmentation(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AugmentationConfig(**wrong)


def _torchvision_functional():
    """torchvision's tensor functions, also where its compiled part does not fit the installed torch."""
    try:
        import torchvision.transforms._functional_tensor as functional
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision.transforms._functional_tensor as functional
    except ImportError:
        pytest.skip("torchvision is not installed")
    return functional


_KEPT: list[object] = []


@pytest.mark.parametrize("turned", [False, True])
def test_crops_lie_evenly_along_the_long_side(turned):
    p = Preprocessing(num_frames=1, image_size=8, resize="bilinear")
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None] * 10, (8, 20, 3))
    frames = (ramp.transpose(1, 0, 2) if turned else ramp)[None].copy()

    def first(crop):  # the value at the start of the long side
        return int(crop[0, 0, 0, 0]) // 10

    crops = fit_crops(frames, p, 3)
    assert crops.shape == (3, 1, 3, 8, 8)
    assert [first(crop) for crop in crops] == [0, 6, 12]
    assert [first(crop) for crop in fit_crops(frames, p, 4)] == [0, 4, 8, 12]
    assert torch.equal(fit_crops(frames, p, 1)[0], crops[1])


def test_the_middle_crop_is_what_a_model_that_keeps_the_aspect_sees():
    p = Preprocessing(num_frames=2, image_size=12, resize="bilinear", keep_aspect=True)
    frames = np.random.default_rng(0).integers(0, 256, (2, 30, 46, 3), dtype=np.uint8)
    assert torch.equal(fit_crops(frames, p, 3)[1], fit(frames, p))
    square = frames[:, :, :30]
    assert torch.equal(fit_crops(square, p, 3), fit(square, p).expand(3, -1, -1, -1, -1))
    with pytest.raises(ValueError, match="at least 1 crop"):
        fit_crops(frames, p, 0)
