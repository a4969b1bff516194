"""From config to objects: what is refused, what is frozen, how weights are averaged and words masked."""

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlm.errors import ConfigError, UsageError
from vlm.models import load_model
from vlm.models.weights import save_model
from vlm.training import setup
from vlm.training.average import MovingAverage
from vlm.training.config import EngineConfig, TrainingConfig, forbidden_changes
from vlm.training.objective import MaskedLanguageConfig, step_generator, step_seed
from vlm.training.schedule import first_without, value_at
from vlm.training.setup import (
    abilities,
    freeze,
    make_model,
    make_objective,
    make_tokenizer,
    masking_rule,
    prepare_process,
)
from vlm.training.sources.opening import open_source

CPU = torch.device("cpu")


def test_abilities_follow_the_losses(tiny):
    assert abilities(tiny()) == {"search", "rerank", "choose"}
    assert abilities(tiny("losses.matching.weight=0")) == {"search"}
    assert abilities(tiny("losses.contrastive.weight=0")) == {"rerank"}


def test_no_loss_at_all_is_refused(tiny):
    with pytest.raises(Exception, match="at least one weight must be above 0"):
        tiny(*(f"losses.{part}.weight=0" for part in ("contrastive", "matching", "masked_language")))


@pytest.mark.parametrize(
    ("contrastive", "matching", "step"),
    [
        ("[[0, 0], [10, 1]]", "0", 0),
        ("[[0, 1], [3, 0]]", "[[3, 0], [4, 1]]", 3),
        ("[[0, 1], [3, -1]]", "[[2, 0], [4, 1]]", 2),
        ("[[0, 1], [1.5, 0]]", "[[4, 0], [5, 1]]", 2),
    ],
)
def test_a_step_without_a_loss_is_refused_by_its_number(tiny, contrastive, matching, step):
    options = (f"losses.contrastive.weight={contrastive}", f"losses.matching.weight={matching}")
    with pytest.raises(UsageError, match=f"none is at step {step} "):
        tiny(*options, "losses.masked_language.weight=0")
    assert tiny(*options, f"train.max_steps={max(step, 1)}").train.max_steps == max(step, 1)


@given(
    st.lists(
        st.lists(
            st.tuples(st.floats(-2, 12), st.sampled_from([-1.0, 0.0, 1.0, 2.0])), min_size=1, max_size=4
        ),
        max_size=3,
    )
)
def test_the_first_step_without_a_loss_against_a_slow_loop(points):
    curves = [tuple(sorted(dict(curve).items())) for curve in points]
    slow = next((s for s in range(10) if all(value_at(curve, s) <= 0 for curve in curves)), None)
    assert first_without(curves, 10) == slow


def test_the_world_decides_the_vocabulary_and_the_seed_the_weights(tiny):
    config = tiny()
    tokenizer = make_tokenizer(config)
    one, same = make_model(config, tokenizer, CPU), make_model(config, tokenizer, CPU)
    assert one.config.text.vocabulary_size == tokenizer.vocabulary_size < 200
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    other = make_model(tiny("seed=1"), tokenizer, CPU)
    assert not torch.equal(one.vision_proj.weight, other.vision_proj.weight)


def test_training_goes_on_from_a_model_folder(unbroken, tiny):
    config = tiny(f"train.init_from={unbroken / 'model'}", "name=second")
    model = make_model(config, make_tokenizer(config), CPU)
    from safetensors.torch import load_file

    weights = load_file(unbroken / "model" / "model.safetensors")
    assert model.training and model.name == "second"
    assert torch.equal(model.vision_proj.weight, weights["vision_proj.weight"])


@pytest.fixture
def start(tmp_path, tiny):
    """Return a function that saves a new model of the tiny config and gives the override to start from it."""

    def make(*overrides):
        model = make_model(tiny(*overrides), make_tokenizer(tiny()), CPU)
        return f"train.init_from={save_model(model, tmp_path / 'start')}"

    return make


@pytest.mark.parametrize("part", ["matching", "contrastive"])
def test_a_model_is_trained_on_with_a_loss_that_it_was_trained_without(start, tiny, part):
    config = tiny(start(f"losses.{part}.weight=0"))
    model = make_model(config, make_tokenizer(config), CPU)
    with open_source(config, model, 0) as batches:
        loss, terms = make_objective(config, model)(next(batches), 0)
    assert torch.isfinite(loss) and part in terms
    assert model.capabilities == {"search", "rerank", "choose"}
    alone = tiny(f"train.init_from={config.train.init_from}", f"losses.{part}.weight=0")
    assert len(make_model(alone, make_tokenizer(alone), CPU).capabilities) == 1


@pytest.mark.parametrize("of_texts", [True, False])
def test_an_encoder_of_pictures_becomes_one_of_clips(tiny, tmp_path, of_texts):
    sorting = "evaluation.best=top1", "model.vision.time_std=0.3"
    pictures = tiny("classification.world.label=digit", *sorting, "model.vision.num_frames=1")
    trained = make_model(pictures, None, CPU)
    begun = f"train.init_from={save_model(trained, tmp_path / 'pictures')}"
    config = tiny(begun, "model.vision.time_std=0.3")
    if not of_texts:
        config = tiny(begun, "classification.world.label=direction", *sorting)
    model = make_model(config, make_tokenizer(config), CPU)
    own, before = (one.vision_encoder.state_dict() for one in (model, trained))
    new = {name for name in set(own) - set(before) if not name.startswith("pool_norm.")}
    assert new == {"temporal_pos_embedding"} and own["temporal_pos_embedding"].std() > 0.1
    assert all(torch.equal(own[name], before[name]) for name in before)
    # of one frame it says what it said
    picture = torch.rand(2, 1, 3, model.config.vision.image_size, model.config.vision.image_size)
    model.eval(), trained.eval()
    assert torch.equal(model.vision_encoder(picture).tokens, trained.vision_encoder(picture).tokens)
    # used as it is, it has no times yet
    inflated = load_model(tmp_path / "pictures", device="cpu", num_frames=8)
    assert inflated.loaded["missing"] == ["temporal_pos_embedding"]
    assert not inflated.vision_encoder.temporal_pos_embedding.any()


def test_a_model_to_start_from_takes_over_what_it_can(start, tiny):
    begun = start()
    config = tiny(
        begun, "model.vision.num_frames=40", "model.vision.image_size=96", "model.vision.drop_path=0.25",
        "model.vision.independent_frames=true",
    )  # fmt: skip
    model = make_model(config, make_tokenizer(config), CPU)
    assert (model.preprocessing.num_frames, model.preprocessing.image_size) == (40, 96)
    assert model.vision_encoder.config.drop_path == model.config.vision.drop_path == 0.25
    assert model.vision_encoder.config.independent_frames and model.config.vision.independent_frames
    before = load_model(begun.partition("=")[2], device="cpu")
    assert torch.equal(model.vision_proj.weight, before.vision_proj.weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.depth=3", "start has vision.depth 2, model.vision.depth is 3; leave these out"),
        (
            "model.vision.scan_order=temporal",
            "vision.scan_order 'spatial', model.vision.scan_order is 'temporal'",
        ),
        ("model.text.num_layers=3", "text.num_layers 2"),
        ("model.embedding_width=8", "has embedding_width 16, model.embedding_width is 8"),
        ("model.vision.num_frames=5", "are not multiples|do not fit"),
    ],
)
def test_what_a_model_to_start_from_cannot_take_over_is_refused(start, tiny, override, message):
    begun = start()
    with pytest.raises((ConfigError, UsageError), match=message):
        make_model(tiny(begun, override), make_tokenizer(tiny()), CPU)


def test_a_model_to_start_from_keeps_what_nobody_asked_for(start, tiny, caplog):
    """A config without sizes has those of the published model, which nobody chose."""
    begun = start()
    values = yaml.safe_load(tiny.path.read_text())
    del values["model"]
    tiny.path.write_text(yaml.safe_dump(values))
    model = make_model(tiny(begun), make_tokenizer(tiny()), CPU)
    assert model.config.vision.width == 32 and model.preprocessing.image_size == 64
    assert "keeps its image_size 64; 224 is the default" in caplog.text


def test_frozen_parts_do_not_learn_and_unknown_ones_are_named(tiny):
    config = tiny("train.freeze=[text_encoder, temp]")
    model = make_model(config, make_tokenizer(config), CPU)
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"vision_encoder", "vision_proj", "text_proj", "itm_head"}
    with pytest.raises(ConfigError, match="no parameter starts with 'txet'; parts: .*text_encoder"):
        freeze(model, ("txet",))


def test_the_moving_average_follows_and_is_swapped_back():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    average = MovingAverage(module, 0.9)
    nn.init.constant_(module.weight, 2.0)
    average.update(0)  # early decay (1 + 0) / (10 + 0) = 0.1
    assert average.values[0].item() == pytest.approx(1.9)
    average.update(10**6)
    assert average.values[0].item() == pytest.approx(0.9 * 1.9 + 0.1 * 2)
    with average.applied():
        assert module.weight.item() == pytest.approx(1.91)
    assert module.weight.item() == 2.0
    assert not MovingAverage(module, 0.0).values


def test_the_moving_average_follows_running_statistics_with_the_weights():
    """Averaged weights with the live weights' statistics would be a model that was never there."""
    norm = nn.BatchNorm1d(1, affine=False, momentum=1.0)
    average = MovingAverage(norm, 0.9)
    norm(torch.tensor([[3.0], [5.0]]))  # mean 4, variance 2
    average.update(10**6)
    with average.applied():
        assert norm.running_mean.item() == pytest.approx(0.4)
        assert norm.running_var.item() == pytest.approx(0.9 + 0.2)
    assert norm.running_mean.item() == 4.0 and norm.num_batches_tracked == 1


def test_words_to_hide_are_looked_up(tiny):
    tokenizer = make_tokenizer(tiny())
    rule = masking_rule(MaskedLanguageConfig(words=("red", "left"), other_words=0.1), tokenizer)
    ids = tokenizer(["red left blue"], max_tokens=8).input_ids[0, 1:4]
    assert torch.allclose(rule.focus[ids], torch.tensor([1.0, 1.0, 0.1]))
    with pytest.raises(ConfigError, match="does not know 'aardvark'"):
        masking_rule(MaskedLanguageConfig(words=("aardvark",)), tokenizer)


def test_masked_language_needs_its_head(tiny, start):
    config = tiny("model.text.has_language_head=false")
    with pytest.raises(ConfigError, match="has_language_head: true"):
        make_objective(config, make_model(config, make_tokenizer(config), CPU))
    begun = tiny(start("model.text.has_language_head=false", "losses.masked_language.weight=0"))
    with pytest.raises(ConfigError, match="has_language_head: true, or an init_from with one"):
        make_objective(begun, make_model(begun, make_tokenizer(begun), CPU))


def test_step_seeds_depend_on_every_counter():
    seeds = {step_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    assert len(seeds) == 27
    first, second = (torch.rand(4, generator=step_generator(1, 2)) for _ in range(2))
    assert torch.equal(first, second)


def test_an_engine_without_deepspeed_has_no_stages():
    with pytest.raises(ValueError, match="need engine.name 'deepspeed'"):
        EngineConfig(zero_stage=1)
    with pytest.raises(ValueError, match="engine.offload needs engine.zero_stage"):
        EngineConfig(name="deepspeed", offload=True)
    with pytest.raises(ValueError, match="zero_stage 3 splits the weights, .*; use 2, with engine.offload"):
        EngineConfig(name="deepspeed", zero_stage=3)
    with pytest.raises(ValueError, match="must be 0, 1 or 2, got 4"):
        EngineConfig(name="deepspeed", zero_stage=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_an_absent_gpu_is_refused(tiny):
    with pytest.raises(ConfigError, match="no CUDA device answers"):
        prepare_process(tiny("train.device=cuda"))


def test_only_what_changes_nothing_learned_may_change(tiny):
    free = tiny("train.max_steps=9", "data.workers=2", "checkpoint.every=7", "evaluation.every=0")
    assert forbidden_changes(tiny(), free) == []
    patient = tiny("data.shards.max_bad_fraction=0.2")  # as the message of too many bad samples advises
    assert forbidden_changes(tiny(), patient) == []
    classes = "classification={files: {max_bad_fraction: %s}}", "evaluation.best=top1"
    assert forbidden_changes(*(tiny(classes[0] % share, classes[1]) for share in (0.01, 0.2))) == []
    assert forbidden_changes(tiny(), tiny("data.world.grouped=0.25")) == ["data.world.grouped: 0.5 -> 0.25"]
    assert isinstance(tiny(), TrainingConfig)


def test_deepspeed_files_may_not_contradict_the_config(tmp_path):
    from vlm.training.deepspeed_engine import _settings

    path = tmp_path / "ds.json"
    config = EngineConfig(name="deepspeed", zero_stage=1, file=str(path))
    path.write_text('{"train_batch_size": 4}')
    with pytest.raises(ConfigError, match="train_batch_size belong into the training config"):
        _settings(8, config, 1.0)
    path.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match="ZeRO stage 2 differs from engine.zero_stage 1"):
        _settings(8, config, 1.0)
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    zero = _settings(8, config, 0.5)["zero_optimization"]
    assert zero == {"stage": 1, "reduce_bucket_size": 1000}
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        _settings(8, config, 1.0)


def test_a_new_text_encoder_starts_from_bert_and_a_trained_one_does_not(tiny, unbroken, tmp_path):
    from safetensors.torch import save_file

    config = tiny(f"train.text_from={tmp_path / 'bert.safetensors'}")
    tokenizer = make_tokenizer(config)
    other = make_model(tiny("seed=5"), tokenizer, CPU).text_encoder.state_dict()
    save_file(
        {name: value for name, value in other.items() if "crossatt" not in name}, config.train.text_from
    )
    text = make_model(config, tokenizer, CPU).text_encoder.state_dict()
    plain = make_model(tiny(), tokenizer, CPU).text_encoder.state_dict()
    for name, value in text.items():
        assert torch.equal(value, (plain if "crossatt" in name else other)[name]), name
    trained = tiny(
        f"train.text_from={tmp_path / 'bert.safetensors'}", f"train.init_from={unbroken / 'model'}"
    )
    with pytest.raises(ConfigError, match="train.text_from: expected a run that makes a new text encoder"):
        make_model(trained, tokenizer, CPU)


@pytest.mark.parametrize("is_fast", [False, True])
def test_bf16_on_a_processor_that_has_none_is_said(tiny, monkeypatch, caplog, is_fast):
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: is_fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    prepare_process(tiny("train.precision=fp32"))
    assert not caplog.records
    prepare_process(tiny("train.precision=bf16"))
    assert ["bf16" in record.message for record in caplog.records] == [True] * (not is_fast)
    # other processors are not asked
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    assert setup.has_fast_bf16()
