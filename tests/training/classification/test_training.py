"""Runs of a classifier from beginning to end: resuming to the bit, files, starting points, refusals."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlm.config import load_config
from vlm.errors import ConfigError, DataError, InvalidInput, UsageError
from vlm.models import Classifier, load_model
from vlm.models.weights import save_model
from vlm.training.checkpoint import load_tensors
from vlm.training.config import TrainingConfig
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import make_model
from vlm.training.sources.opening import open_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unbroken(tiny_path, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(load_config(TrainingConfig, tiny_path), run)
    return run


def weights(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    state = load_tensors(newest / "engine.pt")
    moments = state["optimizer"]["state"]
    return {
        **{
            f"model/{name}": tensor for name, tensor in load_file(run / "model" / "model.safetensors").items()
        },
        **{f"module/{name}": tensor for name, tensor in state["module"].items()},
        **{f"{index}/{name}": value for index, each in moments.items() for name, value in each.items()},
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_leaves_metrics_and_a_classifier_that_knows_its_classes(unbroken):
    lines = read_lines(unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] == line["classification"] and "temperature" not in line for line in lines)
    assert {"val/top1", "val/top5", "val/mean_class"} <= lines[1].keys() and "val/top1" not in lines[2]
    model = load_model(unbroken / "model", device="cpu")
    assert isinstance(model, Classifier) and model.capabilities == {"classify"}
    assert len(model.config.class_names) == 13 and model.config.class_names[0] == "move left"
    assert model(torch.zeros(2, 8, 3, 64, 64)).shape == (2, 13)
    assert not any("pool_norm" in name for name in model.state_dict())
    best = max(line.get("val/top1", -1.0) for line in lines)
    assert json.loads((unbroken / "best" / "card.json").read_text())["training"]["top1"] == best


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(unbroken, tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny("train.max_steps=4", "data.workers=1"), run)
    train(tiny(), run, resume=True)
    assert_equal(weights(run), weights(unbroken))
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_what_is_learned_must_not_change_on_the_way(unbroken, tiny):
    with pytest.raises(ConfigError, match="classification.label_smoothing: 0.1 -> 0.0"):
        train(tiny("classification.label_smoothing=0.0"), unbroken, resume=True)


def test_files_resume_to_the_bit_whatever_the_workers(files, tmp_path):
    train(files("data.workers=2"), tmp_path / "whole")
    train(files("train.max_steps=4"), tmp_path / "run")
    train(files(), tmp_path / "run", resume=True)
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    for name in ("metrics.jsonl",):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert load_model(tmp_path / "run" / "model").config.class_names == ("black", "dark", "grey", "bright")


def test_batches_of_files_hold_each_video_twice_with_its_label(files, clips):
    config = files()
    model = make_model(config, None, CPU)
    with open_source(config, model, 0) as batches:
        first, second = next(batches), next(batches)
    with open_source(config, model, 1) as batches:
        again = next(batches)
    truth = dict(line.split(",") for line in (clips / "train.csv").read_text().split("\n") if line)
    for batch in (first, second):
        assert batch.keys[::2] == batch.keys[1::2]
        assert batch.labels.tolist() == [int(truth[key]) for key in batch.keys]
        assert all(not torch.equal(batch.video[i], batch.video[i + 1]) for i in range(0, 8, 2))
    assert {*first.keys, *second.keys} == set(truth)  # eight videos, four a batch: one epoch
    assert torch.equal(again.video, second.video) and again.keys == second.keys


def test_world_batches_are_what_the_scenes_say(tiny):
    from vlm.world import ACTIONS, action, sample_scene

    for choice in ("direction", "action", "digit"):
        config = tiny(f"classification.world.label={choice}")
        model = make_model(config, None, CPU)
        with open_source(config, model, 2) as batches:
            batch = next(batches)
        assert len(set(batch.keys)) == len(batch.keys) == 8
        for key, label in zip(batch.keys, batch.labels.tolist(), strict=True):
            split, seed, index, _ = key.split("-")
            scene = sample_scene(split, int(seed), int(index))
            assert len(scene.things if choice == "digit" else scene.events) == 1
            assert action(scene, choice) == ACTIONS[choice][label]


def test_a_missing_video_is_listed_and_too_many_stop_the_run(files, clips, tmp_path):
    broken = tmp_path / "train.csv"
    broken.write_text((clips / "train.csv").read_text() + "gone.mp4,1\n")
    train(
        files(f"classification.files.train={broken}", "classification.files.max_bad_fraction=0.2"),
        tmp_path / "run",
    )
    (row,) = {
        json.dumps([r["video"], r["reason"]]) for r in read_lines(tmp_path / "run" / "rejected-0.jsonl")
    }
    assert json.loads(row) == ["gone.mp4", "missing"]
    with pytest.raises(DataError, match="cannot be used"):
        train(files(f"classification.files.train={broken}"), tmp_path / "strict")


def test_a_class_that_names_a_side_forbids_mirroring(files, tmp_path):
    sided = tmp_path / "classes.txt"
    sided.write_text("Pushing something from left to right\nb\nc\nd\n")
    with pytest.raises(ConfigError, match="flip is 0.5, but mirrored clips of the class 'Pushing something"):
        make_model(files(f"classification.files.classes={sided}"), None, CPU)
    make_model(
        files(f"classification.files.classes={sided}", "classification.files.augmentation.flip=0"), None, CPU
    )


def test_numbers_are_no_names(files):
    model = make_model(files("classification.files.classes=null"), None, CPU)
    assert (model.config.num_classes, model.config.class_names) == (4, ())


def test_starting_points(unbroken, tiny, tmp_path, files):
    start = load_model(unbroken / "model", device="cpu")
    source = f"train.init_from={unbroken / 'model'}"
    fresh = make_model(tiny(source, "seed=3"), None, CPU)
    for name, tensor in start.vision_encoder.state_dict().items():
        assert torch.equal(fresh.vision_encoder.state_dict()[name], tensor), name
    assert not torch.equal(fresh.head.weight, start.head.weight)
    kept = make_model(tiny(source, "classification.head=keep"), None, CPU)
    assert torch.equal(kept.head.weight, start.head.weight) and kept.training
    # the drop path is this run's, not the trained model's
    assert (
        make_model(tiny(source, "model.vision.drop_path=0.5"), None, CPU).vision_encoder.config.drop_path
        == 0.5
    )
    with pytest.raises(
        ConfigError, match="expected train.init_from to be a classifier of 4 classes, got one of 13"
    ):
        make_model(files(source, "classification.head=keep"), None, CPU)
    with pytest.raises(ConfigError, match="has other classes, or in another order"):
        make_model(_renamed(tiny, start, tmp_path), None, CPU)
    with pytest.raises(ConfigError, match="got none; set it to 'new'"):
        make_model(tiny("classification.head=keep"), None, CPU)
    with pytest.raises(ConfigError, match="give model.vision the sizes of that encoder"):
        make_model(tiny(source, "model.vision.depth=3"), None, CPU)


def _renamed(tiny, start, folder):
    from dataclasses import replace

    start.config = replace(start.config, class_names=tuple(reversed(start.config.class_names)))
    save_model(start, folder / "renamed")
    return tiny(f"train.init_from={folder / 'renamed'}", "classification.head=keep")


def test_more_frames_and_pixels_resize_the_tables(unbroken, tiny):
    start = load_model(unbroken / "model", device="cpu").vision_encoder
    config = tiny(
        f"train.init_from={unbroken / 'model'}", "model.vision.num_frames=40", "model.vision.image_size=96"
    )
    grown = make_model(config, None, CPU)
    times = grown.vision_encoder.temporal_pos_embedding
    expected = torch.nn.functional.interpolate(
        start.temporal_pos_embedding.detach().transpose(1, 2), size=40, mode="linear", align_corners=False
    )
    assert torch.allclose(times, expected.transpose(1, 2), atol=1e-6)
    assert grown.vision_encoder.pos_embed.shape == (1, 10, 32)
    assert (grown.preprocessing.num_frames, grown.preprocessing.image_size) == (40, 96)


def test_a_video_text_model_gives_its_encoder(tiny, tmp_path):
    from vlm.models.text_encoder import TextEncoderConfig
    from vlm.models.video_text_model import VideoTextConfig, VideoTextModel

    vision = tiny().model.vision
    text = TextEncoderConfig(
        vocabulary_size=20, width=16, num_layers=2, fusion_layer=1, num_heads=2, intermediate_width=16,
        max_positions=8, vision_width=32,
    )  # fmt: skip
    start = VideoTextModel(VideoTextConfig(vision=vision, text=text, embedding_width=8))
    save_model(start, tmp_path / "start")
    model = make_model(tiny(f"train.init_from={tmp_path / 'start'}"), None, CPU)
    for name, tensor in model.vision_encoder.state_dict().items():
        assert torch.equal(tensor, start.vision_encoder.state_dict()[name]), name


def test_an_image_model_is_inflated(tiny, tmp_path):
    """A published ImageNet file: kernels on the middle frame, a table of times that starts at zero."""
    vision = tiny().model.vision
    from dataclasses import replace

    from vlm.models import ClassifierConfig

    image = Classifier(ClassifierConfig(vision=replace(vision, num_frames=1, pool_norm=False), num_classes=9))
    state = {
        name.removeprefix("vision_encoder.").replace("norm.weight", "norm_f.weight")
        if name == "vision_encoder.norm.weight"
        else name.removeprefix("vision_encoder."): tensor
        for name, tensor in image.state_dict().items()
    }
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    torch.save({"model": state}, tmp_path / "videomamba_in1k.pth")
    model = make_model(tiny(f"train.init_from={tmp_path / 'videomamba_in1k.pth'}"), None, CPU)
    assert torch.equal(
        model.vision_encoder.patch_embed.proj.weight[:, :, 0], state["patch_embed.proj.weight"]
    )
    assert torch.equal(model.vision_encoder.temporal_pos_embedding, torch.zeros(1, 8, 32))
    assert model.config.num_classes == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.best=r1", "evaluation.best must be top1"),
        ("model.vision.num_frames=16", "clips of the digit world do not fit"),
        ("classification.source=files", "classification.files.train is needed"),
        ("classification.label_smoothing=1.0", r"must be in \[0, 1\)"),
        ("train.text_from=bert.bin", "a classifier reads no text"),
        ("classification.files.repeats=0", "must be at least 1"),
    ],
)
def test_impossible_configs_are_refused(tiny, change, message):
    with pytest.raises(UsageError, match=message):
        tiny(change)


def test_evaluation_needs_something_to_evaluate_with(files):
    with pytest.raises(UsageError, match="classification.files.val names no videos"):
        files("classification.files.val=null")
    assert files("classification.files.val=null", "evaluation.every=0").classification is not None


def test_labels_that_cannot_be_read_are_named(files, tmp_path):
    empty = tmp_path / "train.csv"
    empty.write_text("\n")
    with pytest.raises(InvalidInput, match="holds no labelled video"):
        make_model(files(f"classification.files.train={empty}"), None, CPU)


def test_a_dry_run_costs_a_classifier(tiny, capsys):
    from vlm.cli import main

    assert main(["train", str(tiny.path), "--dry-run"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["parameters_by_part"].keys() == {"vision_encoder", "dropout", "head"}


def test_the_config_of_a_run_reads_back(unbroken):
    written = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert written["classification"]["mixing"]["cutmix"] == 1.0
    assert load_config(TrainingConfig, unbroken / "config.yaml").optimizer.layer_decay == 0.8
