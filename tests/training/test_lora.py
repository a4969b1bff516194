"""Adapters of a trained model: all are heard and learn, they alone are saved, and merge into its weights."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from vlm.errors import ConfigError, MissingExtra, UsageError
from vlm.models import Classifier, load_model
from vlm.training.checkpoint import load_tensors
from vlm.training.loop import build, train
from vlm.training.reports.tracking import read_lines
from vlm.training.sources.opening import open_source

CPU = torch.device("cpu")


@pytest.fixture
def lora(tiny, unbroken):
    """Return a function that gives the tiny config with adapters of the unbroken run's model."""
    pytest.importorskip("accelerate")
    from vlm.training import adapters

    try:
        adapters._import()
    except MissingExtra:
        pytest.skip("the lora extra is not installed")

    def make(*overrides, settings="{rank: 2, alpha: 6}"):
        return tiny(f"train.init_from={unbroken}/model", f"train.lora={settings}", *overrides)

    return make


def adapted(model):
    return {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}


def outputs(model, batch):
    """What the model makes of a batch: tokens and embeddings of clips, of texts, and scores of pairs."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        videos, texts = model.encode_video(batch.video), model.encode_text(batch.text)
        match = model.match(videos.tokens, texts.tokens, texts.mask)
    model.train(was_training)
    return [videos.tokens, videos.embedding, texts.embedding, match]


def distance(found, expected):
    """The largest relative difference of an output."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.fixture
def state_and_batch(lora, tmp_path):
    config = lora()
    state = build(config, tmp_path / "run", CPU)
    with open_source(config, state.model, 0) as batches:
        return state, next(batches)


def test_every_adapter_is_heard_and_learns_and_nothing_else_does(state_and_batch, unbroken):
    state, batch = state_and_batch
    model, layers = state.model, adapted(state.model)
    names = {name.rpartition(".")[2] for name in layers}
    assert names == {"in_proj", "x_proj", "x_proj_b", "out_proj", "query", "key", "value"}
    assert len(layers) == 2 * 4 + (2 + 1) * 3  # two mixers; two layers of attention, and one to the video
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{name}.lora_{part}.default.weight" for name in layers for part in "AB"}
    silent = outputs(model, batch)
    assert distance(outputs(load_model(unbroken / "model", device="cpu"), batch), silent) == 0
    for name, layer in layers.items():
        second = layer.lora_B["default"].weight
        torch.nn.init.normal_(second, std=5.0)
        assert distance(outputs(model, batch), silent) > 2e-5, name
        torch.nn.init.zeros_(second)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    loss, _ = state.module(batch, 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.norm() > 0) == (name in learning), name


def test_merged_weights_do_what_the_adapters_do(state_and_batch, unbroken):
    from vlm.training.adapters import merged

    state, batch = state_and_batch
    for layer in adapted(state.model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    plain = merged(state.model)
    assert adapted(plain) == {} and adapted(state.model)
    heard = outputs(state.model, batch)
    assert distance(outputs(plain, batch), heard) <= 1e-5
    assert distance(outputs(load_model(unbroken / "model", device="cpu"), batch), heard) > 1e-3


def test_a_run_resumes_to_the_bit_and_leaves_merged_weights_with_the_adapter_beside(lora, tmp_path, unbroken):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(lora(), whole)
    train(lora("train.max_steps=2"), broken)
    train(lora(), broken, resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    checkpoint = whole / "checkpoints" / "step-00000006"
    assert not (checkpoint / "model").exists()
    assert (checkpoint / "adapter" / "adapter_config.json").is_file()
    saved = load_tensors(checkpoint / "engine.pt")["module"]
    assert saved and all(".lora_" in name for name in saved)
    assert (checkpoint / "engine.pt").stat().st_size < (
        unbroken / "checkpoints" / "step-00000006" / "engine.pt"
    ).stat().st_size / 2
    base, final = (load_file(run / "model" / "model.safetensors") for run in (unbroken, whole))
    parts = load_file(whole / "adapter" / "adapter_model.safetensors")
    changed = {name for name in final if not torch.equal(final[name], base[name])}
    expected = {name.replace(".lora_A.weight", ".weight") for name in parts if ".lora_A." in name}
    prefix = "base_model.model." if next(iter(expected)).startswith("base_model.") else ""
    assert changed == {name.removeprefix(prefix) for name in expected}
    for name in changed:
        first, second = (parts[prefix + name.replace(".weight", f".lora_{part}.weight")] for part in "AB")
        torch.testing.assert_close(final[name], base[name] + 3 * second @ first)
    assert load_model(whole / "model").capabilities == load_model(unbroken / "model").capabilities
    assert read_lines(whole / "metrics.jsonl")[-1]["loss"] != read_lines(whole / "metrics.jsonl")[0]["loss"]


def test_a_resume_beside_other_weights_is_refused(lora, unbroken, tmp_path):
    import shutil

    from vlm.models import save_model

    base = tmp_path / "base"
    shutil.copytree(unbroken / "model", base)
    settings = (f"train.init_from={base}", "train.max_steps=1", "evaluation.every=0")
    train(lora(*settings), tmp_path / "run")
    model = load_model(base, device="cpu")
    with torch.no_grad():
        model.temp += 0.01
    save_model(model, base)
    with pytest.raises(
        ConfigError, match="its adapters belong to other weights than those of train.init_from"
    ):
        train(lora(*settings[:1], "train.max_steps=2", "evaluation.every=0"), tmp_path / "run", resume=True)


def test_a_classifier_s_new_head_learns_beside_the_adapters(lora, tmp_path):
    config = lora("classification={}", "evaluation.best=top1", "train.max_steps=2", "evaluation.every=2")
    train(config, tmp_path / "run")
    model = load_model(tmp_path / "run" / "model", device="cpu")
    others = load_file(tmp_path / "run" / "adapter" / "others.safetensors")
    assert isinstance(model, Classifier) and set(others) == {"head.weight", "head.bias"}
    best = load_model(tmp_path / "run" / "best", device="cpu")
    assert best.state_dict().keys() == model.state_dict().keys()


def test_what_does_not_fit_is_refused(lora, tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="train.lora adapts a trained model: name one by train.init_from"):
        tiny("train.lora={}")
    with pytest.raises(ConfigError, match="no linear layer 'in_porj'; it has .*in_proj"):
        build(lora(settings="{targets: [in_porj]}"), tmp_path, CPU)
    with pytest.raises(ConfigError, match="train.lora.others: no parameter starts with 'haed'"):
        build(lora(settings="{others: [haed]}"), tmp_path, CPU)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"train.lora needs peft.*pip install 'videomamba-vlm\[lora\]'"):
        build(lora(), tmp_path, CPU)
