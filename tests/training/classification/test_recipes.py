"""The shipped recipes: the published numbers, and that the small ones learn what no single frame tells."""

import numpy as np
import pytest

from vlm.config import load_config
from vlm.models import load_model
from vlm.training.config import TrainingConfig
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.schedule import learning_rate

VIDEOS = {"k400": 240_436, "ssv2": 168_913, "breakfast": 1_357, "coin": 9_030}
# epochs, learning rate for 256 clips, drop path, layer decay, GPUs, videos a GPU (each twice)
PUBLISHED = {
    ("k400", "tiny"): (70, 2e-4, 0.1, 1.0, 8, 64),
    ("k400", "small"): (50, 2e-4, 0.35, 1.0, 8, 64),
    ("k400", "middle"): (50, 2e-4, 0.8, 1.0, 16, 32),
    ("k400", "masked"): (45, 1e-4, 0.4, 0.8, 16, 32),
    ("ssv2", "tiny"): (35, 4e-4, 0.1, 1.0, 8, 64),
    ("ssv2", "small"): (30, 4e-4, 0.35, 1.0, 8, 64),
    ("ssv2", "middle"): (30, 4e-4, 0.8, 1.0, 16, 32),
    ("ssv2", "masked"): (30, 1e-4, 0.4, 0.8, 16, 32),
    ("breakfast", "tiny"): (70, 2e-4, 0.1, 1.0, 8, 32),
    ("breakfast", "small"): (50, 2e-4, 0.4, 1.0, 16, 16),
    ("breakfast", "middle"): (50, 2e-4, 0.8, 0.8, 8, 8),
    ("breakfast", "masked"): (45, 2e-4, 0.4, 0.8, 8, 8),
    ("coin", "tiny"): (40, 2e-4, 0.1, 1.0, 8, 32),
    ("coin", "small"): (35, 2e-4, 0.4, 1.0, 16, 16),
    ("coin", "middle"): (30, 2e-4, 0.8, 0.8, 8, 8),
    ("coin", "masked"): (30, 2e-4, 0.4, 0.8, 8, 8),
}
SIZES = {"tiny": (192, 24), "small": (384, 24), "middle": (576, 32), "masked": (576, 32)}


@pytest.fixture
def recipe(root):
    return lambda name, *overrides: load_config(
        TrainingConfig, root / "configs" / "train" / "classification" / f"{name}.yaml", overrides
    )


def test_no_recipe_is_left_out(root):
    folder = root / "configs" / "train" / "classification"
    names = {tuple(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.yaml")}
    assert names == {*PUBLISHED, ("digits_direction",), ("digits_long",), ("digits_pictures",)}


@pytest.mark.parametrize(("data", "size"), PUBLISHED)
def test_the_recipe_is_the_published_one(recipe, data, size):
    epochs, rate, drop_path, layer_decay, gpus, share = PUBLISHED[data, size]
    config = recipe(f"{data}/{size}")
    settings, optimizer, steps = config.classification, config.optimizer, config.train.max_steps
    videos = gpus * share
    assert config.train.batch_size == 2 * videos and settings.repeats == 2
    epoch = VIDEOS[data] // videos  # what does not fill a batch is dropped
    assert steps == epochs * epoch and optimizer.warmup_steps == 5 * epoch
    assert optimizer.learning_rate == pytest.approx(rate * 2 * videos / 256)
    lowest = learning_rate(steps, optimizer, steps)
    assert lowest == pytest.approx(1e-6 * 2 * videos / 256, rel=0.02)
    assert (optimizer.betas, optimizer.clip_norm, optimizer.layer_decay) == ((0.9, 0.999), 0.0, layer_decay)
    assert optimizer.weight_decay == (0.1 if size == "tiny" else 0.05)
    vision = config.model.vision
    assert (vision.width, vision.depth, vision.drop_path) == (*SIZES[size], drop_path)
    assert (vision.image_size, vision.num_frames) == (224, 32 if data in ("breakfast", "coin") else 8)
    augmentation = settings.files.augmentation
    strength = (augmentation.operations, augmentation.magnitude, augmentation.magnitude_std)
    assert strength == ((2, 5.0, 0.25) if size == "tiny" else (4, 7.0, 0.5))
    assert (augmentation.min_scale, augmentation.erase) == (0.08, 0.25)
    assert augmentation.flip == (0.0 if data == "ssv2" else 0.5)
    assert (settings.label_smoothing, settings.mixing.mixup, settings.mixing.cutmix) == (0.1, 0.8, 1.0)
    assert settings.files.sampling == "segments" and config.train.precision == "bf16"
    assert config.train.init_from is not None and config.evaluation.best == "top1"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_model_learns_which_way_things_move(recipe, tmp_path):
    """No single frame tells the direction, and of four guesses one is right."""
    # the score is near 40 %; on 400 clips the bound would be there too
    clips = 1600
    small = (
        "train.max_steps=250", "evaluation.every=250", "checkpoint.every=250", "train.log_every=10",
        f"evaluation.clips={clips}",
    )  # fmt: skip
    train(recipe("digits_direction", *small), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["classification"] > 1.2  # log(4) = 1.39
    assert np.mean([line["classification"] for line in lines[-4:]]) < 1.2
    # seven standard deviations of guessing
    assert lines[-1]["val/top1"] > 0.25 + 7 * (0.25 * 0.75 / clips) ** 0.5


def test_pictures_run_through_the_same_recipe(recipe, tmp_path):
    small = ("data.workers=0", "model.vision.depth=1", "train.max_steps=2", "train.batch_size=2",
             "train.precision=fp32", "evaluation.clips=10", "evaluation.every=2")  # fmt: skip
    config = recipe("digits_pictures", *small)
    assert (config.model.vision.num_frames, config.classification.reads) == (1, "mean")
    train(config, tmp_path / "run")
    assert 0 <= read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["val/top1"] <= 1
    model = load_model(tmp_path / "run" / "model")
    assert model.config.reads == "mean" and model.config.num_classes == 10


def test_long_clips_run_through_the_same_recipe(recipe, tmp_path):
    small = (
        "model.vision.image_size=32", "model.vision.patch_size=16", "model.vision.depth=1", "data.workers=0",
        "train.max_steps=2", "train.batch_size=2", "evaluation.clips=2", "evaluation.every=2",
    )  # fmt: skip
    config = recipe("digits_long", *small)
    assert config.model.vision.num_frames == 40
    train(config, tmp_path / "run")
    assert {"val/top1", "val/top5"} <= read_lines(tmp_path / "run" / "metrics.jsonl")[-1].keys()
