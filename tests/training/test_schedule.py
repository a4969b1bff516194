"""The learning rate worked out by hand, curves, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from vlm.training.schedule import (
    OptimizerConfig,
    check_curve,
    is_decayed,
    is_ever_positive,
    learning_rate,
    make_optimizer,
    value_at,
)


def test_warmup_then_half_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_ratio=0.1)
    rates = [learning_rate(step, config, 12) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert rates[12] == pytest.approx(0.1) and rates[13] == pytest.approx(0.1)


def test_a_fixed_decay_makes_a_short_run_the_beginning_of_a_long_one():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_steps=100)
    assert [learning_rate(s, config, 10) for s in range(10)] == [
        learning_rate(s, config, 100) for s in range(10)
    ]
    free = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    assert learning_rate(9, free, 10) < 0.1 < learning_rate(9, free, 100)


def test_curves_are_linear_between_points_and_constant_outside():
    curve = ((10.0, 0.0), (20.0, 1.0), (40.0, 0.5))
    assert [value_at(curve, step) for step in (0, 10, 15, 20, 30, 40, 99)] == [0, 0, 0.5, 1, 0.75, 0.5, 0.5]
    assert value_at(0.3, 7) == 0.3
    assert is_ever_positive(curve) and not is_ever_positive(0.0) and not is_ever_positive(((0.0, 0.0),))


@pytest.mark.parametrize("curve", [(), ((5.0, 1.0), (5.0, 2.0)), ((5.0, 1.0), (4.0, 2.0))])
def test_curves_that_go_back_or_are_empty_are_refused(curve):
    with pytest.raises(ValueError, match="data.world.grouped must be a number or a list"):
        check_curve("data.world.grouped", curve)


def test_only_matrices_decay_and_neither_tables_nor_scan_dynamics(tiny):
    from vlm.training.setup import make_model, make_tokenizer

    config = tiny()
    model = make_model(config, make_tokenizer(config), torch.device("cpu"))
    decayed = {name for name, parameter in model.named_parameters() if is_decayed(name, parameter)}
    kept = {name for name, _ in model.named_parameters()} - decayed
    mixer = "vision_encoder.layers.0.mixer"
    assert {f"{mixer}.in_proj.weight", f"{mixer}.dt_proj.weight", "vision_proj.weight"} <= decayed
    never = {
        "temp", "itm_head.bias", "vision_encoder.pos_embed", "vision_encoder.cls_token",
        "vision_encoder.temporal_pos_embedding", "vision_encoder.layers.0.norm.weight",
        f"{mixer}.A_log", f"{mixer}.A_b_log", f"{mixer}.D", f"{mixer}.D_b", f"{mixer}.dt_proj.bias",
    }  # fmt: skip
    assert never <= kept
    assert any(name.endswith("word_embeddings.weight") for name in kept)


def test_weight_decay_moves_a_matrix_without_gradient_and_no_vector():
    module = nn.Linear(2, 2)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = make_optimizer(module, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module.weight, before[0] * 0.95) and torch.equal(module.bias, before[1])
