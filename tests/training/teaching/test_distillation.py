"""Self-distillation: its loss by hand, alone and with text, masked too, and what is saved of it."""

import pytest
import torch
import torch.nn.functional as F

from vlm.errors import InvalidInput, UsageError
from vlm.models import Classifier, ClassifierConfig, EncoderModel, VideoMambaConfig, load_model
from vlm.training.checkpoint import load_tensors
from vlm.training.loop import train
from vlm.training.setup import make_model, make_objective, make_tokenizer
from vlm.training.sources.opening import open_source
from vlm.training.teaching.distillation import DistillationConfig, make_distillation
from vlm.types import Preprocessing

CPU = torch.device("cpu")


@pytest.fixture
def distilled(tiny, teacher, no_text):
    def make(*overrides, text=True):
        return tiny(
            "model.vision.patch_size=16",
            "losses.distillation.weight=1",
            f"losses.distillation.teacher={teacher}",
            *(() if text else (*no_text, "evaluation.every=0")),
            *overrides,
        )

    return make


def start(config):
    model = make_model(config, make_tokenizer(config), CPU)
    with open_source(config, model, 0) as batches:
        return make_objective(config, model), next(batches)


def test_the_loss_is_that_of_the_paper(distilled, teacher):
    objective, batch = start(distilled(text=False))
    head = objective.distillation
    torch.nn.init.uniform_(head.norm.weight, 0.5, 2.0)
    torch.nn.init.uniform_(head.head.bias)
    loss, parts = objective(batch, 0)
    with torch.no_grad():
        own = objective.model.vision_encoder(batch.video).tokens
        normed = own / (own.square().mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm.weight
        target = load_model(teacher, device="cpu").vision_encoder(batch.video).tokens
        projected = normed @ head.head.weight.T + head.head.bias
        cosines = [
            F.cosine_similarity(projected[i, j], target[i, j], dim=0) for i in range(8) for j in range(129)
        ]
        expected = sum(2 - 2 * cosine for cosine in cosines) / len(cosines)
    assert set(parts) == {"distillation"}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_falls_and_teaches_the_encoder_without_changing_the_teacher(distilled, teacher):
    objective, batch = start(distilled(text=False))
    assert type(objective.model) is EncoderModel
    before = objective.distillation._teacher(batch.video).tokens
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        loss, _ = objective(batch, step)
        optimizer.zero_grad()
        loss.backward()
        assert [name for name, p in objective.model.named_parameters() if p.grad is None] == [
            "vision_encoder.pool_norm.weight",
            "vision_encoder.pool_norm.bias",
        ]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(objective.distillation._teacher(batch.video).tokens, before)


def test_it_joins_the_text_losses_and_follows_its_curve(distilled):
    objective, batch = start(distilled("losses.distillation.weight=[[0, 2], [10, 0]]"))
    total, parts = objective(batch, 5)
    rest = parts["contrastive"] + parts["matching"] + 0.2 * parts["masked_language"]
    assert total.item() == pytest.approx((rest + parts["distillation"]).item(), rel=1e-6)
    assert "distillation" not in objective(batch, 10)[1]


def test_masked_students_are_compared_where_they_see(aligned, teacher):
    config = aligned("losses.distillation.weight=1", f"losses.distillation.teacher={teacher}", text=False)
    objective, batch = start(config)
    mask = objective._view(batch, 0).mask
    output = objective.model.vision_encoder(batch.video, mask)
    parts = objective(batch, 0)[1]
    target = objective.distillation._teacher(batch.video).tokens[0]
    rows = torch.stack([torch.cat([t[:1], t[1:][~m]]) for t, m in zip(target, mask, strict=True)])
    head = objective.distillation
    cosines = F.cosine_similarity(head.head(head.norm(output.tokens)[0]), rows, dim=-1)
    assert parts["distillation"].item() == pytest.approx((2 - 2 * cosines).mean().item(), rel=1e-5)


def test_a_classifier_learns_from_it_as_well(teacher):
    """What an objective of any model with a video encoder has to add to its loss."""
    vision = VideoMambaConfig(width=32, depth=2, num_frames=8, image_size=64, pool_norm=False)
    model = Classifier(ClassifierConfig(vision=vision, num_classes=3))
    distillation = make_distillation(
        DistillationConfig(weight=1.0, teacher=str(teacher)), vision, model.preprocessing, CPU
    )
    video = torch.randn(2, 8, 3, 64, 64)
    tokens = model.vision_encoder(video).tokens
    loss = F.cross_entropy(model.head(tokens[:, 0]), torch.tensor([0, 2])) + distillation(video, tokens)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_head_is_resumed_and_left_out_of_the_model(distilled, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(distilled(text=False), whole)
    train(distilled("train.max_steps=2", text=False), broken)
    train(distilled(text=False), broken, resume=True)
    states = [load_tensors(run / "checkpoints" / "step-00000006" / "engine.pt") for run in (whole, broken)]
    one, other = (state["module"] for state in states)
    heads = {name for name in one if name.startswith("distillation.")}
    assert heads == {"distillation.norm.weight", "distillation.head.weight", "distillation.head.bias"}
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    names = dict(load_model(whole / "model").named_parameters())
    assert not any("distill" in name for name in names)


def test_teachers_are_needed_and_must_fit(tiny, teacher):
    with pytest.raises(UsageError, match="losses.distillation: a teacher is needed: the folder or name"):
        tiny("losses.distillation.weight=1")
    longer = VideoMambaConfig(width=32, depth=2, num_frames=8, image_size=64, patch_size=32)
    config = DistillationConfig(weight=1.0, teacher=str(teacher))
    with pytest.raises(InvalidInput, match="makes 8 x 4 x 4 tokens, the student 8 x 2 x 2"):
        make_distillation(config, longer, Preprocessing(image_size=64), CPU)
    assert make_distillation(DistillationConfig(), longer, Preprocessing(), CPU) is None
