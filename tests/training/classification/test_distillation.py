"""A classifier that learns from a smaller one: the loss of the paper, its curve, and what is saved."""

import pytest
import torch
import torch.nn.functional as F

from vlm.errors import InvalidInput
from vlm.models import Classifier, ClassifierConfig, VideoMambaConfig, load_model, save_model
from vlm.training.checkpoint import load_tensors
from vlm.training.classification.objective import LabelledBatch
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import make_model, make_objective

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(11)
    vision = VideoMambaConfig(
        width=16, depth=2, num_frames=8, image_size=64, patch_size=32, state_size=4, pool_norm=False
    )
    model = Classifier(ClassifierConfig(vision=vision, num_classes=3))
    return save_model(model, tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def distilled(tiny, teacher):
    def make(*overrides, weight="1"):
        source = (f"losses.distillation.weight={weight}", f"losses.distillation.teacher={teacher}")
        return tiny("model.vision.drop_path=0", *source, *overrides)

    return make


def start(config):
    model = make_model(config, None, CPU)
    batch = LabelledBatch(video=torch.randn(4, 8, 3, 64, 64), labels=torch.tensor([0, 5, 12, 3]))
    return make_objective(config, model), batch


def test_the_loss_is_cross_entropy_and_the_angle_to_a_smaller_classifier_s_tokens(distilled, teacher):
    objective, batch = start(distilled("classification.mixing={mixup: 0, cutmix: 0}", weight="0.5"))
    head = objective.distillation
    torch.nn.init.uniform_(head.norm.weight, 0.5, 2.0)
    loss, terms = objective(batch, 0)
    with torch.no_grad():
        own = objective.model.vision_encoder(batch.video).tokens
        normed = own / (own.square().mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm.weight
        projected = normed @ head.head.weight.T + head.head.bias
        target = load_model(teacher, device="cpu").vision_encoder(batch.video).tokens
        lesson = (2 - 2 * F.cosine_similarity(projected, target, dim=-1)).mean()
        entropy = F.cross_entropy(objective.model(batch.video), batch.labels, label_smoothing=0.1)
    assert terms.keys() == {"classification", "distillation"}
    assert terms["distillation"].item() == pytest.approx(lesson.item(), rel=1e-5)
    assert terms["classification"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert loss.item() == pytest.approx((entropy + 0.5 * lesson).item(), rel=1e-5)
    loss.backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


def test_the_teacher_sees_mixed_clips_and_the_weight_follows_its_curve(distilled, monkeypatch):
    objective, batch = start(distilled("classification.mixing.mixup=0.8", weight="[[0, 2], [10, 0]]"))
    seen = []
    own = objective.distillation.forward
    monkeypatch.setattr(
        objective.distillation, "forward", lambda video, t: seen.append(video) or own(video, t)
    )
    loss, terms = objective(batch, 5)
    assert loss.item() == pytest.approx((terms["classification"] + terms["distillation"]).item(), rel=1e-6)
    assert seen[0].shape == batch.video.shape and not torch.equal(seen[0], batch.video)
    assert "distillation" not in objective(batch, 10)[1]


def test_a_run_logs_both_resumes_to_the_bit_and_saves_no_teacher(distilled, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(distilled(), whole)
    train(distilled("train.max_steps=2"), broken)
    train(distilled(), broken, resume=True)
    states = [load_tensors(run / "checkpoints" / "step-00000006" / "engine.pt") for run in (whole, broken)]
    one, other = (state["module"] for state in states)
    heads = {name for name in one if name.startswith("distillation.")}
    assert heads == {"distillation.norm.weight", "distillation.head.weight", "distillation.head.bias"}
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for line in read_lines(whole / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(line["classification"] + line["distillation"], rel=1e-6)
    assert not any("distill" in name for name, _ in load_model(whole / "model").named_parameters())


def test_a_teacher_of_other_places_is_refused(distilled):
    config = distilled("model.vision.patch_size=16")
    with pytest.raises(InvalidInput, match="makes 8 x 2 x 2 tokens, the student 8 x 4 x 4"):
        make_objective(config, make_model(config, None, CPU))
