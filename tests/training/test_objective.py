"""The sum of the losses, the switch of precision, and batches that leave nothing to match."""

import pytest
import torch

from vlm.training.objective import Objective
from vlm.training.setup import make_model, make_objective, make_tokenizer
from vlm.training.sources.opening import open_source
from vlm.types import Batch

CPU = torch.device("cpu")


@pytest.fixture
def objective_and_batch(tiny):
    def make(*overrides):
        config = tiny(*overrides)
        model = make_model(config, make_tokenizer(config), CPU)
        with open_source(config, model, 0) as batches:
            batch = next(batches)
        return make_objective(config, model), batch

    return make


def test_weights_follow_their_curves(objective_and_batch):
    objective, batch = objective_and_batch("losses.matching.weight=[[10, 0], [20, 2]]")
    total, parts = objective(batch, 0)
    assert set(parts) == {"contrastive", "masked_language"}
    assert total.item() == pytest.approx((parts["contrastive"] + 0.2 * parts["masked_language"]).item())
    total, parts = objective(batch, 15)
    expected = parts["contrastive"] + parts["matching"] + 0.2 * parts["masked_language"]
    assert total.item() == pytest.approx(expected.item())


def test_every_learning_weight_gets_a_gradient(objective_and_batch):
    objective, batch = objective_and_batch()
    objective(batch, 0)[0].backward()
    without = [name for name, p in objective.model.named_parameters() if p.grad is None]
    assert without == []


def test_bf16_is_close_to_fp32_and_leaves_the_weights_alone(objective_and_batch):
    exact, batch = objective_and_batch()
    coarse, _ = objective_and_batch("train.precision=bf16")
    assert coarse.autocast and not exact.autocast
    assert {p.dtype for p in coarse.parameters()} == {torch.float32}
    one, other = exact(batch, 0)[0], coarse(batch, 0)[0]
    other.backward()
    assert other.item() == pytest.approx(one.item(), rel=2e-2) and one.item() != other.item()
    assert all(torch.isfinite(p.grad).all() for p in coarse.parameters())


def test_the_temperature_is_kept_in_its_range(objective_and_batch):
    objective, batch = objective_and_batch()
    with torch.no_grad():
        objective.model.temp.fill_(3.0)
    objective(batch, 0)
    assert objective.model.temp.item() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_without_false_pairs_is_learned_from_all_the_same(objective_and_batch, size):
    objective, batch = objective_and_batch()
    text = type(batch.text)(*(tensor[:1].expand(size, -1) for tensor in batch.text))
    same = Batch(
        video=batch.video[:1].expand(size, -1, -1, -1, -1),
        text=text,
        positives=torch.ones(size, size, dtype=torch.bool),
    )
    total, parts = objective(same, 0)
    total.backward()
    assert torch.isfinite(total) and parts["contrastive"].item() == pytest.approx(
        torch.tensor(float(size)).log().item(), abs=1e-5
    )


def test_the_video_encoder_can_be_left_out_of_matching(objective_and_batch):
    objective, batch = objective_and_batch(
        "losses.matching.detach_video=true", "losses.contrastive.weight=0", "losses.masked_language.weight=0"
    )
    assert isinstance(objective, Objective)
    objective(batch, 0)[0].backward()
    assert all(p.grad is None for p in objective.model.vision_encoder.parameters())
    assert objective.model.itm_head.weight.grad is not None
