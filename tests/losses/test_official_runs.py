"""Whole training forwards of the official code, with their draws: every loss, every gradient's size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vlm.losses.alignment import alignment_loss
from vlm.losses.contrastive import embedding_contrastive_loss
from vlm.losses.masked_language import masked_language_loss
from vlm.losses.matching import matching_loss, negative_weights
from vlm.models import TokenBatch, from_official

FILE = Path(__file__).parents[1] / "fixtures" / "umt_videomamba_tiny.safetensors"
RUNS = {
    # run: whether the pooled feature keeps time there
    "pretrain_attention_video": False,
    "pretrain_tube_video": True,
    "pretrain_random_video": False,
    "pretrain_attention_image": True,
    "unmasked_video": True,
}


@pytest.fixture(scope="module")
def published():
    with safe_open(FILE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return tensors, config


@pytest.fixture(scope="module", params=RUNS)
def losses(request, published):
    """A run's losses with the recorded draws, the model with their sum's gradients, and the numbers."""
    numbers, config = published
    state = {k.removeprefix("state_dict/"): v for k, v in numbers.items() if k.startswith("state_dict/")}
    model, _ = from_official(state, overrides={"num_attention_heads": 4})
    run = {k.removeprefix(f"{request.param}/"): v for k, v in numbers.items() if k.startswith(request.param)}
    video = numbers["input/image" if request.param.endswith("image") else "input/video"]
    mask = run["mask"].bool()[:, 1:] if "mask" in run else None
    output = model.vision_encoder(video, mask)
    videos = model.video_features(output, video.shape[1], mask, keep_temporal=RUNS[request.param])
    words = TokenBatch(numbers["input/input_ids"], numbers["input/attention_mask"])
    texts = model.encode_text(words)
    positives = numbers["input/idx"][:, None] == numbers["input/idx"][None]
    own = torch.arange(4)
    drawn_videos, drawn_texts = (run[f"draw/vtm_neg_{side}/result"][:, 0] for side in ("vision", "text"))
    pairs_video, pairs_text = torch.cat([own, drawn_videos, own]), torch.cat([own, own, drawn_texts])
    logits = model.match(videos.tokens[pairs_video], texts.tokens[pairs_text], texts.mask[pairs_text])
    guesses = model.masked_language_logits(run["mlm_input_ids"], words.attention_mask, videos.tokens)
    found = {
        "vtc": embedding_contrastive_loss(videos.embedding, texts.embedding, model.temperature(), positives),
        "vtm": matching_loss(logits, (torch.arange(12) < 4).long()),
        "mlm": masked_language_loss(guesses, run["mlm_labels"]),
    }
    if mask is not None:
        student = model.vision_encoder.align(output, mask, video.shape[1])
        found["uta"] = alignment_loss(student, run["clip_output_visible"])
    torch.stack(list(found.values())).sum().backward()
    scores = (videos.embedding @ texts.embedding.T / model.temp).detach()
    names = config["runs"][request.param]
    return found, model, run, names, (scores, positives)


def relative(actual, expected):
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


def test_every_loss_equals_the_official_one(losses):
    found, _, run, *_ = losses
    for name, loss in found.items():
        assert relative(loss, run[f"loss_{name}"]) < 2e-5, name
    assert "uta" in found or run["loss_uta"] == 0


def test_negatives_would_be_drawn_with_the_official_probabilities(losses):
    *_, run, _, (scores, positives) = losses
    for side, matrix, true in (("text", scores, positives), ("vision", scores.T, positives.T)):
        expected = run[f"draw/vtm_neg_{side}/weights"]
        assert relative(negative_weights(matrix, true), expected / expected.sum(1, keepdim=True)) < 1e-4


def test_every_gradient_has_the_official_size_and_the_saved_ones_are_equal(losses):
    _, model, run, names, _ = losses
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked = 0
    for name, norm in zip(names["grad_norm_names"], run["grad_norms"].tolist(), strict=True):
        if name.endswith("self.key.bias"):  # zero but for rounding: a softmax does not feel it
            continue
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-8), name
        checked += 1
    assert checked > 160
    saved = [key.removeprefix("grad/") for key in run if key.startswith("grad/")]
    assert len(saved) >= 15
    for name in saved:
        assert relative(gradients[name], run[f"grad/{name}"]) < 1e-4, name


def test_what_has_no_gradient_officially_has_none_here(losses):
    _, model, _, names, _ = losses
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == set(names["params_without_grad"])
