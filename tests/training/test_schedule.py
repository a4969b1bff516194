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
    parameter_groups,
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


def layered(overrides=(), tiny=None):
    from vlm.training.setup import make_model, make_tokenizer

    config = tiny("model.vision.depth=3", *overrides)
    return make_model(config, make_tokenizer(config), torch.device("cpu"))


def test_each_layer_learns_at_its_own_part_of_the_rate(tiny):
    module = nn.ModuleDict({"model": layered(tiny=tiny)})  # as an objective holds it
    groups = parameter_groups(module, 0.05, layer_decay=0.5)
    where = {id(p): group for group in groups for p in group["params"]}
    encoder = "model.vision_encoder."
    expected = {
        f"{encoder}patch_embed.proj.weight": 0.5**4,
        f"{encoder}cls_token": 0.5**4,
        f"{encoder}pos_embed": 0.5**4,
        f"{encoder}temporal_pos_embedding": 0.5**4,
        f"{encoder}layers.0.mixer.A_log": 0.5**3,
        f"{encoder}layers.0.norm.weight": 0.5**3,
        f"{encoder}layers.1.mixer.in_proj.weight": 0.5**2,
        f"{encoder}layers.2.mixer.out_proj.weight": 0.5,
        f"{encoder}norm.weight": 1.0,
        f"{encoder}pool_norm.weight": 1.0,
        "model.vision_proj.weight": 1.0,
        "model.text_encoder.bert.encoder.layer.0.output.dense.weight": 1.0,  # no block of the video encoder
    }
    named = dict(module.named_parameters())
    assert {name: where[id(named[name])]["rate_factor"] for name in expected} == expected
    for name, parameter in named.items():
        assert where[id(parameter)]["weight_decay"] == (0.05 if is_decayed(name, parameter) else 0.0), name
    # by block depth alone: whatever belongs to block i has the factor of block i
    for name, parameter in named.items():
        if ".layers." in name:
            block = int(name.split(".layers.")[1].split(".")[0])
            assert where[id(parameter)]["rate_factor"] == 0.5 ** (3 - block), name


def test_every_learning_parameter_is_in_exactly_one_group(tiny):
    model = layered(["train.freeze=[text_encoder]"], tiny)
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for decay in (1.0, 0.8):
        members = [id(p) for group in parameter_groups(model, 0.05, decay) for p in group["params"]]
        assert len(members) == len(set(members)) and set(members) == learning
    assert len(parameter_groups(model, 0.05)) == 2


def test_the_engine_moves_each_layer_by_its_part(tiny):
    from vlm.training.engine import PlainEngine

    model = layered(tiny=tiny)
    named = dict(model.named_parameters())
    names = [
        "patch_embed.proj.bias",
        "layers.0.mixer.D",
        "layers.1.mixer.D",
        "layers.2.mixer.D",
        "norm.weight",
    ]
    watched = [named[f"vision_encoder.{name}"] for name in names]
    before = [parameter.detach().clone() for parameter in watched]
    optimizer = make_optimizer(model, OptimizerConfig(layer_decay=0.5))
    engine = PlainEngine(model, optimizer, clip_norm=0.0)
    loss = sum((parameter.sum() for parameter in watched), torch.zeros(()))
    engine.differentiate(loss)
    engine.update(0.01)
    # AdamW's first step moves everything by the learning rate
    moved = [float((old - new.detach()).mean()) for old, new in zip(before, watched, strict=True)]
    assert moved == pytest.approx([0.01 * 0.5**k for k in (4, 3, 2, 1, 0)], rel=1e-4)
    with pytest.raises(ValueError, match="layer_decay must be in"):
        OptimizerConfig(layer_decay=0.0)
