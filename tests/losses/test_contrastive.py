"""The contrastive loss against the published numbers, against loops, and at its edges."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.losses.contrastive import contrastive_loss, contrastive_targets, mean_embedding, similarity

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def published():
    return load_file(FIXTURES / "losses_metrics.safetensors")


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def positives_of(published, which):
    ids = published["input/idx"] if which == "idx" else torch.arange(6)
    return ids[:, None] == ids[None]


@pytest.mark.parametrize("frames", ["v3_t2", "v2_t2", "v2_t3"])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_similarity_equals_the_published_numbers(published, frames, aggregate):
    video = published[f"input/vision_proj_{frames[1]}d"]
    text = published[f"input/text_proj_{frames[4]}d"]
    actual = similarity(video, text, published["input/temp"], aggregate)
    assert relative(actual, published[f"get_sim/{frames}/{aggregate}/v2t"]) < 2e-5
    assert relative(actual.T, published[f"get_sim/{frames}/{aggregate}/t2v"]) < 2e-5


@pytest.mark.parametrize("which", ["idx", "noidx"])
def test_targets_equal_the_published_rule(published, which):
    assert torch.equal(contrastive_targets(positives_of(published, which)), published[f"targets/{which}"])


@pytest.mark.parametrize("which", ["idx", "noidx"])
@pytest.mark.parametrize("dims", ["3d", "2d"])
@pytest.mark.parametrize("mode", ["gradient", "local_gradient", "none"])
def test_loss_and_gradients_equal_the_published_numbers(published, dims, which, mode):
    video = published[f"input/vision_proj_{dims}"].requires_grad_()
    text = published["input/text_proj_2d"].requires_grad_()
    temperature = published["input/temp"].requires_grad_()
    for leaf in (video, text, temperature):
        leaf.grad = None
    loss = contrastive_loss(video, text, temperature, positives_of(published, which), mode=mode)
    loss.backward()
    where = f"vtc/{dims}/{which}"
    assert relative(loss.detach(), published[f"{where}/loss"]) < 2e-5
    assert relative(video.grad, published[f"{where}/grad_vision_proj"]) < 1e-4
    assert relative(text.grad, published[f"{where}/grad_text_proj"]) < 1e-4
    assert relative(temperature.grad, published[f"{where}/grad_temp"]) < 1e-4


def test_one_sided_truth_gives_each_direction_its_own_targets():
    # text 1 ("something moves") is true of both videos, text 0 only of video 0
    video, text = torch.eye(2), torch.eye(2)
    positives = torch.tensor([[True, True], [False, True]])
    logits = torch.eye(2) / 0.5
    logs = logits.log_softmax(1)
    to_text = -(0.5 * logs[0, 0] + 0.5 * logs[0, 1] + logs[1, 1]) / 2
    logs = logits.T.log_softmax(1)
    to_video = -(logs[0, 0] + 0.5 * logs[1, 0] + 0.5 * logs[1, 1]) / 2
    expected = (to_text + to_video) / 2
    assert torch.allclose(contrastive_loss(video, text, 0.5, positives), expected)


def test_a_batch_of_one_and_a_batch_of_equals_have_nothing_to_learn():
    one = torch.randn(1, 3, 8, requires_grad=True)
    loss = contrastive_loss(one, torch.randn(1, 8), 0.07, torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and one.grad.abs().max() == 0
    same = torch.randn(1, 8).expand(4, 8)
    loss = contrastive_loss(same, same, 0.07, torch.ones(4, 4, dtype=torch.bool))
    assert torch.allclose(loss, torch.tensor(4.0).log())


def test_frames_are_normalised_before_their_mean_and_not_after():
    frames = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])
    assert torch.allclose(mean_embedding(frames), torch.tensor([[0.5, 0.5]]))


def test_wrong_positives_are_refused():
    video = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"positives must be \(3, 3\), a row a video, got \(2, 2\)"):
        contrastive_loss(video, video, 1.0, torch.ones(2, 2, dtype=torch.bool))
    lonely = torch.eye(3, dtype=torch.bool)
    lonely[1, 1] = False
    with pytest.raises(ValueError, match="row 1 of positives has no true partner"):
        contrastive_loss(video, video, 1.0, lonely)
