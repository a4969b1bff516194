"""Masked alignment: alone and with text, what the encoder sees, and the official run's loss."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from vlm.errors import ConfigError, UsageError
from vlm.models import EncoderModel, from_official
from vlm.models.teachers.token_teachers import load_teacher
from vlm.training.setup import make_model, make_objective, make_tokenizer
from vlm.training.sources.opening import open_source
from vlm.training.teaching.alignment import Alignment, AlignmentConfig, View, visible
from vlm.types import Batch, TokenBatch

CPU = torch.device("cpu")
KINDS = ("attention", "random", "tube", "clip_row", "frame_row")


def start(config):
    """Return the objective and the first batch of a run."""
    model = make_model(config, make_tokenizer(config), CPU)
    with open_source(config, model, 0) as batches:
        return make_objective(config, model), next(batches)


def clip_settings(official_clip):
    return (f"losses.alignment.teacher={official_clip}", "model.vision.alignment_width=24")


def test_alignment_alone_trains_an_encoder_and_its_loss_falls(aligned):
    objective, batch = start(aligned(text=False))
    assert type(objective.model) is EncoderModel and batch.text.input_ids.shape == (8, 0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, parts = objective(batch, 0)
        assert set(parts) == {"alignment"} and loss.item() == parts["alignment"].item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_every_learning_weight_gets_a_gradient_from_the_four_losses(aligned):
    objective, batch = start(aligned())
    loss, parts = objective(batch, 0)
    assert set(parts) == {"alignment", "contrastive", "matching", "masked_language"}
    loss.backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_never_reach_the_encoder(aligned, official_clip, kind):
    settings = clip_settings(official_clip) if kind == "attention" else ()
    objective, batch = start(
        aligned(f"losses.alignment.mask={kind}", "losses.alignment.ratio=0.75", *settings)
    )
    video = batch.video.clone().requires_grad_()
    seen = []
    objective.model.vision_encoder.layers[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    objective(dataclasses.replace(batch, video=video), 0)[0].backward()
    mask = objective._view(batch, 0).mask
    assert seen[0].shape[1] == 1 + 8 * 16 - int(mask[0].sum()) < 1 + 8 * 16 * 0.3
    pixels = video.grad.abs().unfold(3, 16, 16).unfold(4, 16, 16).sum(dim=(2, 5, 6)).flatten(1)
    assert (pixels[mask] == 0).all() and (pixels[~mask] > 0).all()


def test_masks_differ_by_clip_and_step_and_not_by_process(aligned):
    objective, batch = start(aligned("losses.alignment.mask=random", text=False))
    whole = objective._view(batch, 5).mask
    assert not torch.equal(whole, objective._view(batch, 6).mask)
    assert len({tuple(row.tolist()) for row in whole}) == 8
    second = Batch(video=batch.video[4:], text=batch.text, positives=batch.positives, offset=4)
    assert torch.equal(objective._view(second, 5).mask, whole[4:])


def test_videos_are_whole_while_the_weight_is_zero(aligned):
    objective, batch = start(aligned("losses.alignment.weight=[[2, 1], [3, 0]]"))
    plain, _ = start(aligned("losses.alignment.weight=0"))
    assert objective._view(batch, 2) is not None and objective._view(batch, 3) is None
    for name in ("contrastive", "matching", "masked_language"):
        assert objective(batch, 3)[1][name] == plain(batch, 3)[1][name]
        assert objective(batch, 2)[1][name] != plain(batch, 2)[1][name]


@pytest.mark.parametrize(("kind", "steps"), [("tube", 8), ("frame_row", 1)])
def test_time_is_kept_by_tubes_alone_as_published(aligned, kind, steps, monkeypatch):
    objective, batch = start(aligned(f"losses.alignment.mask={kind}"))
    pooled = []
    real = objective.model.video_features
    monkeypatch.setattr(
        objective.model, "video_features", lambda *a: pooled.append(real(*a).pooled) or real(*a)
    )
    objective(batch, 0)
    assert pooled[0].shape[1] == steps


def test_pictures_have_a_ratio_of_their_own(aligned, official_clip):
    settings = clip_settings(official_clip)
    objective, batch = start(aligned("losses.alignment.mask=attention", *settings, text=False))
    picture = dataclasses.replace(batch, video=batch.video[:, :1])
    assert objective._view(picture, 0).mask.sum(1).tolist() == [8] * 8
    assert torch.isfinite(objective(picture, 0)[0])


@pytest.mark.parametrize("run", ["attention_video", "tube_video", "random_video", "attention_image"])
def test_the_loss_is_the_official_one(fixtures, official_clip, run):
    with safe_open(fixtures / "umt_videomamba_tiny.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"])["teacher"]["output_dim"] == 24
        numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {k.removeprefix("state_dict/"): v for k, v in numbers.items() if k.startswith("state_dict/")}
    model, _ = from_official(state, overrides={"num_attention_heads": 4})
    teacher = load_teacher(
        official_clip, model.config.vision, model.preprocessing, device=CPU, normalisation="student"
    )
    config = AlignmentConfig(weight=1.0, teacher=official_clip, mask=run.rpartition("_")[0])
    video = numbers["input/image" if run.endswith("image") else "input/video"]
    view = View(numbers[f"pretrain_{run}/mask"].bool()[:, 1:], teacher(video))
    expected = numbers[f"pretrain_{run}/clip_output_visible"]
    assert torch.allclose(visible(view.lesson.tokens, view.mask), expected, atol=2e-5)
    alignment = Alignment(config, teacher, model.vision_encoder)
    with torch.no_grad():
        loss = alignment.loss(model.vision_encoder(video, view.mask), view, video.shape[1])
    assert loss.item() == pytest.approx(numbers[f"pretrain_{run}/loss_uta"].item(), rel=2e-5)


def test_bf16_is_close_to_fp32(aligned):
    exact, batch = start(aligned(text=False))
    rough, _ = start(aligned("train.precision=bf16", text=False))
    one, other = exact(batch, 0)[0], rough(batch, 0)[0]
    assert other.item() == pytest.approx(one.item(), rel=2e-2) and one.item() != other.item()


def test_a_text_model_without_tokens_to_read_is_not_asked_for_any(aligned):
    assert make_tokenizer(aligned(text=False)) is None
    assert isinstance(start(aligned())[1].text, TokenBatch)


def test_what_does_not_fit_is_refused(aligned, tiny):
    with pytest.raises(ConfigError, match="alignment_width: 16 and alignment_layers: 1, got 24 and 1"):
        start(aligned("model.vision.alignment_width=24"))
    with pytest.raises(ConfigError, match="has no attention to follow; use random, tube"):
        start(aligned("losses.alignment.mask=attention"))
    with pytest.raises(UsageError, match="losses.alignment: a teacher is needed"):
        tiny("losses.alignment.weight=1")
    with pytest.raises(UsageError, match="evaluation.every must be 0 where no loss reads text"):
        aligned("evaluation.every=2", text=False)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        AlignmentConfig(ratio=1.0)
    with pytest.raises(ValueError, match="must be at least 1"):
        AlignmentConfig(layers=0)


def test_several_blocks_are_aligned_with_as_many_of_the_teacher_s(aligned, official_clip):
    objective, batch = start(
        aligned(
            *clip_settings(official_clip),
            "losses.alignment.mask=attention",
            "losses.alignment.layers=2",
            "losses.alignment.interval=2",
            "model.vision.alignment_layers=2",
            text=False,
        )
    )
    view, encoder = objective._view(batch, 0), objective.model.vision_encoder
    output = encoder(batch.video, view.mask)
    student, lesson = encoder.align(output, view.mask, 8), visible(view.lesson.tokens, view.mask)
    assert student.shape == lesson.shape == (2, 8, 1 + 8 * 4, 24)
    each = [2 - 2 * torch.cosine_similarity(student[k], lesson[k], dim=-1).mean() for k in range(2)]
    loss = objective(batch, 0)[0]
    assert loss.item() == pytest.approx((each[0] + each[1]).item() / 2, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in encoder.clip_decoder.parameters())
