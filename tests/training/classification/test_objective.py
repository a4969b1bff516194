"""Mixing and soft labels worked out by hand; what a batch learns follows from (seed, step)."""

import numpy as np
import pytest
import torch

from vlm.errors import ConfigError
from vlm.models import Classifier
from vlm.training.classification.config import ClassificationConfig, MixingConfig
from vlm.training.classification.objective import (
    ClassificationObjective,
    LabelledBatch,
    Mix,
    draw_mix,
    mix_clips,
    partners,
    soft_labels,
)


def test_partners_are_the_neighbouring_video_never_a_copy_of_the_same():
    assert partners(torch.arange(4), 1).tolist() == [1, 0, 3, 2]
    # two clips a video: videos a a b b | c c d d
    assert partners(torch.arange(8), 2).tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    for repeats in (1, 2, 3):
        videos = torch.arange(12) // repeats
        assert (partners(videos, repeats) != videos).all()
        assert torch.equal(partners(partners(videos, repeats), repeats), videos)


def test_labels_by_hand():
    plain = soft_labels(torch.tensor([0, 2]), 4, 0.2, Mix(1.0, None), 1)
    assert torch.allclose(plain, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]))
    mixed = soft_labels(torch.tensor([0, 2]), 4, 0.2, Mix(0.75, None), 1)
    assert torch.allclose(mixed, torch.tensor([[0.65, 0.05, 0.25, 0.05], [0.25, 0.05, 0.65, 0.05]]))
    assert torch.allclose(mixed.sum(1), torch.ones(2))


def test_clips_by_hand():
    video = torch.stack([torch.full((2, 3, 4, 4), value) for value in (0.0, 8.0)])
    faded = mix_clips(video, Mix(0.75, None), 1)
    assert faded[0].unique().tolist() == [2.0] and faded[1].unique().tolist() == [6.0]
    pasted = mix_clips(video, Mix(0.875, (1, 3, 2, 3)), 1)
    expected = torch.zeros(4, 4)
    expected[1:3, 2] = 8.0
    assert torch.equal(pasted[0], expected.expand(2, 3, 4, 4))  # the same window in every frame
    assert torch.equal(pasted[1], (8 - expected).expand(2, 3, 4, 4))
    assert video[0].unique().tolist() == [0.0]  # the batch itself is not changed


def test_the_share_of_a_window_is_what_is_left_of_the_picture():
    rng = np.random.default_rng(0)
    config = MixingConfig(cutmix=1.0)
    for _ in range(200):
        share, window = draw_mix(config, 16, rng)
        picture = np.ones((16, 16))
        assert window is not None
        picture[window[0] : window[1], window[2] : window[3]] = 0
        assert share == pytest.approx(picture.mean())


def test_how_often_and_how_much_is_mixed():
    def draws(**settings):
        rng = np.random.default_rng(1)
        return [draw_mix(MixingConfig(**settings), 16, rng) for _ in range(2000)]

    both = draws(mixup=0.8, cutmix=1.0, switch=0.25, probability=0.5)
    assert 0.45 < np.mean([mix == Mix(1.0, None) for mix in both]) < 0.55
    assert 0.10 < np.mean([mix.window is not None for mix in both]) < 0.15  # a quarter of a half
    shares = [mix.share for mix in draws(mixup=0.8)]
    # beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), rel=0.1)
    assert all(mix == Mix(1.0, None) for mix in draws())


def test_the_loss_is_the_cross_entropy_of_soft_labels_and_the_same_again(tiny):
    from vlm.training.setup import make_model, make_tokenizer

    config = tiny("model.vision.drop_path=0")
    model = make_model(config, make_tokenizer(config), torch.device("cpu"))
    assert isinstance(model, Classifier) and model.config.num_classes == 13
    batch = LabelledBatch(video=torch.randn(4, 8, 3, 64, 64), labels=torch.tensor([0, 5, 12, 3]))
    objective = ClassificationObjective(model, config.classification, seed=7)
    loss, parts = objective(batch, 3)
    assert torch.equal(loss, objective(batch, 3)[0]) and torch.equal(parts["classification"], loss.detach())
    assert not torch.equal(loss, objective(batch, 4)[0])
    still = ClassificationObjective(model, ClassificationConfig(label_smoothing=0.26), seed=7)
    logs = model(batch.video).log_softmax(1)
    expected = -(0.74 * logs[torch.arange(4), batch.labels] + 0.02 * logs.sum(1)).mean()
    assert torch.allclose(still(batch, 0)[0], expected)


def test_batches_that_do_not_split_into_pairs_are_refused(tiny, files):
    from vlm.training.setup import make_model, make_objective

    model = make_model(tiny(), None, torch.device("cpu"))
    plain = "classification.mixing={mixup: 0, cutmix: 0}"
    with pytest.raises(
        ConfigError, match="6 clips, expected a multiple of 4: 2 repeats of a video, videos mi"
    ):
        make_objective(files("train.batch_size=6"), model)
    with pytest.raises(ConfigError, match="3 clips, expected a multiple of 2: 2 repeats of a video$"):
        make_objective(files("train.batch_size=3", plain), model)
    with pytest.raises(ConfigError, match="2 clips, expected a multiple of 4"):
        make_objective(files("train.batch_size=8", "train.accumulate=4"), model)
    make_objective(files("train.batch_size=6", plain), model)


@pytest.mark.parametrize("wrong", [{"mixup": -1.0}, {"probability": 1.5}, {"switch": -0.1}])
def test_impossible_mixing_is_refused(wrong):
    with pytest.raises(ValueError, match="classification.mixing"):
        MixingConfig(**wrong)
