"""The published three stages end to end, each from the model of the one before, and the resumption of one."""

import pytest
import torch
from safetensors.torch import load_file

from vlm.config import dump
from vlm.errors import ConfigError
from vlm.models import EncoderModel, VideoTextModel, load_model
from vlm.training.checkpoint import load_tensors
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import make_model, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


def test_alignment_then_masked_then_whole(aligned, folder):
    first = train(aligned(text=False), folder / "first")
    encoder = load_model(first)
    assert type(encoder) is EncoderModel and encoder.kind == "encoder" and not encoder.capabilities
    line = read_lines(folder / "first" / "metrics.jsonl")[-1]
    assert line["loss"] == line["alignment"] and "temperature" not in line

    config = aligned(f"train.init_from={first}", "optimizer.ema_decay=0")
    start = make_model(config, make_tokenizer(config), CPU)
    for name, weight in encoder.vision_encoder.state_dict().items():
        assert torch.equal(start.vision_encoder.state_dict()[name], weight), name
    second = train(config, folder / "second")
    assert {"alignment", "contrastive", "matching", "masked_language"} <= read_lines(
        folder / "second" / "metrics.jsonl"
    )[-1].keys()

    third = train(
        aligned(
            f"train.init_from={second}",
            "losses.alignment.weight=0",
            "train.freeze=[vision_encoder.clip_decoder]",
        ),
        folder / "third",
    )
    model = load_model(third)
    assert isinstance(model, VideoTextModel) and model.capabilities == {"search", "rerank", "choose"}
    assert "alignment" not in read_lines(folder / "third" / "metrics.jsonl")[-1]
    before, after = (load_file(path / "model.safetensors") for path in (second, third))
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if "clip_decoder" in name
    }


def test_a_resumed_alignment_equals_an_unbroken_one_and_saves_no_teacher(aligned, folder, tmp_path):
    whole = tmp_path / "whole"
    train(aligned(text=False), whole)
    broken = tmp_path / "broken"
    train(aligned("train.max_steps=4", text=False), broken)
    train(aligned(text=False), broken, resume=True)
    names = ("checkpoints/step-00000006/engine.pt", "model/model.safetensors")
    for name in names[1:]:
        one, other = (load_file(run / name) for run in (whole, broken))
        assert all(torch.equal(one[key], other[key]) for key in one)
    state = load_tensors(whole / names[0])["module"]
    assert all(name.startswith("model.vision_encoder.") for name in state)


def test_an_encoder_of_other_sizes_is_refused_by_name(aligned, teacher):
    config = aligned(f"train.init_from={teacher}")
    with pytest.raises(
        ConfigError, match=r"has cls_token of shape \(1, 1, 16\), model.vision makes it \(1, 1, 32\)"
    ):
        make_model(config, make_tokenizer(config), CPU)


def test_pooling_norm_and_alignment_heads_may_be_new(aligned, teacher):
    sizes = ("width=16", "patch_size=16", "state_size=4")
    overrides = [f"model.vision.{size}" for size in sizes] + ["model.text.vision_width=16"]
    config = aligned(f"train.init_from={teacher}", *overrides)
    model = make_model(config, make_tokenizer(config), CPU)
    other = load_model(teacher, device="cpu").vision_encoder
    assert torch.equal(model.vision_encoder.pos_embed, other.pos_embed)
    assert model.vision_encoder.pool_norm is not None and len(model.vision_encoder.clip_decoder) == 1


def test_a_model_without_a_video_encoder_is_no_start(aligned, official_clip):
    config = aligned(f"train.init_from={official_clip}")
    with pytest.raises(
        ConfigError, match="expected a model with a video encoder, got FrameEncoder from open_clip"
    ):
        make_model(config, make_tokenizer(config), CPU)


def test_two_processes_log_what_one_logs(aligned, teacher, tmp_path, launch):
    config = aligned(
        "losses.alignment.mask=frame_row",
        "losses.distillation.weight=1",
        f"losses.distillation.teacher={teacher}",
        "evaluation.every=0",
        "train.max_steps=3",
    )
    train(config, tmp_path / "one")
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    both = launch("train", str(path), "--out", str(tmp_path / "two"), processes=2)
    _, errors = both.communicate(timeout=240)
    assert both.returncode == 0, errors
    lines, expected = (read_lines(tmp_path / run / "metrics.jsonl") for run in ("two", "one"))
    assert len(lines) == len(expected) == 3 and {"alignment", "distillation"} <= lines[0].keys()
    for line, other in zip(lines, expected, strict=True):
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=2e-4), (line["step"], name)
