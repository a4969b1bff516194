"""What a dry run tells: files, sizes, memory against a measured update, and what is not here."""

import itertools
import json
from collections import Counter

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from vlm.cli import main
from vlm.models import load_model
from vlm.training.loop import build
from vlm.training.planning.estimate import estimate
from vlm.training.planning.files import needed_files
from vlm.training.planning.memory import kept_bytes, made_up_batch, memory_megabytes, telling_steps
from vlm.training.schedule import value_at
from vlm.training.setup import make_model, make_tokenizer
from vlm.training.sources.opening import open_source

CPU = torch.device("cpu")
MIDDLING = (
    "model.vision={width: 64, depth: 4, num_frames: 8, image_size: 128, patch_size: 16, drop_path: 0.0}",
    "model.text.vision_width=64",
    "losses.matching.num_siblings=0",
    "evaluation.every=0",
)
FACTOR = 1.1  # between what is told and what the allocator was seen to give out


def peak_megabytes(work):
    """Return the most that PyTorch's allocator held of what it gave out during ``work``, in 10^6 bytes.

    Not the process's resident memory, which depends on what earlier tests left to be used again.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 1e6


def test_memory_is_what_an_update_takes(tiny, tmp_path):
    config = tiny(*MIDDLING)
    told = estimate(config)["memory_megabytes"]
    state = build(config, tmp_path / "run", CPU)
    state.update(
        [made_up_batch(config, state.model, 2)], 0, 0
    )  # after which gradients and averages are there
    batch = made_up_batch(config, state.model, config.train.batch_size)
    seen = peak_megabytes(lambda: state.update([batch], 0, 0))
    assert told["activations"] > 50 and told["activations"] / FACTOR <= seen <= told["activations"] * FACTOR
    rest = sum(told[name] for name in told if name not in ("activations", "total"))
    assert told["total"] == pytest.approx(rest + told["activations"], abs=0.5)


@pytest.mark.parametrize(
    "options",
    [
        ("losses.matching={weight: [[3, 0], [4, 1]], num_siblings: 0}",),
        ("losses.matching.num_siblings=1", "data.world.grouped=0.5"),
        (
            "losses.matching={weight: [[0, 0], [2, 1]], num_siblings: 1}",
            "data.world.grouped=[[0, 0], [5, 1]]",
        ),
    ],
)
def test_memory_is_that_of_the_step_that_takes_most(tiny, tmp_path, options):
    """Against batches of the world themselves, at every step."""
    config = tiny(*MIDDLING, "train.batch_size=16", *options)
    told = estimate(config)["memory_megabytes"]["activations"]
    state = build(config, tmp_path / "run", CPU)
    with open_source(config, state.model, 0) as batches:
        seen = [kept_bytes(state.module, next(batches), step) / 1e6 for step in range(6)]
    assert max(seen) / FACTOR <= told <= max(seen) * FACTOR
    assert max(seen) > 1.1 * min(seen) or "0.5" in options[-1]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.world.pictures.every=1", "data.world.pictures.batch_size=16"),
        ("model.vision.num_frames=1",),
    ],
)
def test_memory_for_texts_is_that_of_the_longest_of_the_world(tiny, tmp_path, options):
    """Wide texts beside small clips, so that their length decides; batches of the world themselves."""
    config = tiny(
        "model.vision.patch_size=32", "train.batch_size=32", "evaluation.every=0", "losses.matching.weight=0",
        "model.text={width: 256, num_heads: 4, intermediate_width: 1024, vision_width: 32}", *options,
    )  # fmt: skip
    told = estimate(config)["memory_megabytes"]["activations"]
    state = build(config, tmp_path / "run", CPU)
    with open_source(config, state.model, 0) as batches:
        seen = [kept_bytes(state.module, next(batches), step) / 1e6 for step in range(6)]
    assert max(seen) / FACTOR <= told <= 1.25 * max(seen), (told, max(seen))


def test_steps_that_tell_show_every_set_of_losses(tiny):
    weights = {"contrastive": [[0, 1], [3, 0]], "matching": [[2, 0], [4, 1]], "masked_language": 0.0}
    config = tiny(*(f"losses.{name}.weight={curve}" for name, curve in weights.items()))
    sets = {
        tuple(value_at(curve, step) > 0 for curve in config.losses.weights) for step in telling_steps(config)
    }
    assert sets == {tuple(value_at(curve, step) > 0 for curve in config.losses.weights) for step in range(6)}
    assert len(sets) == 2 and telling_steps(tiny()) == [0]


def test_a_model_to_start_from_is_measured_by_its_own_sizes(tiny, unbroken):
    """The config names none of them: the defaults are many times as large."""
    values = yaml.safe_load(tiny.path.read_text())
    del values["model"]
    tiny.path.write_text(yaml.safe_dump(values))
    told = estimate(tiny(f"train.init_from={unbroken}/model", "evaluation.every=0"))
    assert told["config"]["model"]["vision"]["image_size"] == 224
    assert told["tokens_per_clip"] == 8 * (64 // 32) ** 2 + 1
    assert told["memory_megabytes"]["batch"] == pytest.approx(8 * 8 * 4 * 3 * 64 * 64 / 1e6, abs=0.05)
    longer = estimate(
        tiny(f"train.init_from={unbroken}/model", "model.vision.num_frames=40", "evaluation.every=0")
    )
    assert longer["updates"][0]["num_frames"] == 40 and longer["tokens_per_clip"] == 40 * 4 + 1


def test_what_is_kept_is_counted_to_the_byte():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, batch, number):
            product = batch.video * self.weight  # keeps the video and the weight, which are known
            loss = product.sin().sum()  # keeps the product
            return loss, {}

    class Video:
        video = torch.ones(7, 1000)

    assert kept_bytes(Square(), Video) == 7 * 1000 * 4


def test_recomputed_blocks_keep_less_and_learn_the_same(tiny, tmp_path, unbroken):
    plain = build(tiny(*MIDDLING), tmp_path / "plain", CPU)
    option = "model.vision.activation_checkpointing=true"
    spare = build(tiny(*MIDDLING, option), tmp_path / "spare", CPU)
    batch = made_up_batch(tiny(*MIDDLING), plain.model, 4)
    assert kept_bytes(spare.module, batch) < 0.5 * kept_bytes(plain.module, batch)
    one, other = plain.update([batch], 0, 0), spare.update([batch], 0, 0)
    assert one == pytest.approx(other, rel=1e-6)
    started = make_model(tiny(f"train.init_from={unbroken}/model", option), None, CPU)
    assert started.vision_encoder.recompute  # although that model's own config says no


def test_stages_and_parts_divide_what_they_divide(tiny, tmp_path):
    config = tiny()
    module = build(config, tmp_path, CPU).module
    learning = 4e-6 * sum(p.numel() for p in module.parameters())
    stage = "engine={name: deepspeed, zero_stage: %d, offload: %s}"
    no_batch = {"frames": 0, "teachers_mb": 0.0}
    alone = memory_megabytes(config, module, kept=8e6, processes=1, **no_batch)
    assert alone["optimizer"] == pytest.approx(2 * learning, abs=0.1) and alone["activations"] == 8.0
    for options, processes, gradients, optimizer in (
        ("train.log_every=1", 4, 2 * learning, 2 * learning),
        (stage % (1, "false"), 4, learning, 3 * learning / 4),
        (stage % (2, "false"), 4, learning / 4, 3 * learning / 4),
        (stage % (2, "true"), 4, learning / 4, 0),
    ):
        parts = memory_megabytes(tiny(options), module, kept=0, processes=processes, **no_batch)
        assert parts["gradients"] == pytest.approx(gradients, abs=0.1), options
        assert parts["optimizer"] == pytest.approx(optimizer, abs=0.1), options


def test_the_disk_is_what_a_run_leaves(tiny, unbroken):
    told = estimate(tiny())
    newest = unbroken / "checkpoints" / "step-00000006"
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6
    assert told["checkpoint_megabytes"] == pytest.approx(size, rel=0.15)
    assert told["disk_megabytes"] >= sum(p.stat().st_size for p in unbroken.rglob("*") if p.is_file()) / 1e6
    assert told["learning_parameters"] == told["parameters"] == load_model(unbroken / "model").num_parameters
    assert told["missing"] == [] and told["files"] == []
    frozen = estimate(tiny("train.freeze=[text_encoder]", "evaluation.every=0"))
    assert frozen["frozen_parameters"] == told["parameters_by_part"]["text_encoder"]


def test_nothing_that_is_not_here_is_fetched_and_all_of_it_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    monkeypatch.setattr("vlm.text.vocabulary.cached_vocabulary", lambda: None)
    config = tiny(
        "tokenizer=bert",
        "model.text.vocabulary_size=30522",
        "evaluation.every=0",
        "train.init_from=videomamba-m-5m",
        f"train.text_from={tmp_path}/bert.safetensors",
        "data.source=shards",
        f"data.shards.corpora.near.folders=[{tmp_path}/none]",
        "data.shards.corpora.remote.folders=['https://example.org/shards']",
        "losses.distillation={weight: 1, teacher: ./gone}",
    )
    files = {file.source: file for file in needed_files(config)}
    assert [file.present for file in files.values()] == [False, False, False, False, False, True]
    vocabulary, start, text, teacher, shards, remote = files.values()
    assert (vocabulary.key, vocabulary.megabytes, vocabulary.licence) == ("tokenizer", 0.232, "Apache-2.0")
    assert (start.megabytes, start.licence, start.note) == (
        381.232, "Apache-2.0", "vlm models pull videomamba-m-5m",
    )  # fmt: skip
    where = "hf download google-bert/bert-base-uncased model.safetensors (440 MB, Apache-2.0"
    assert text.note.startswith(where) and teacher.key == "losses.distillation.teacher"
    assert (shards.key, remote.key) == tuple(
        f"data.shards.corpora.{name}.folders" for name in ("near", "remote")
    )
    assert shards.note == "no such path" and "in the course of the run" in remote.note
    told = estimate(config)
    assert told["hours"] is None and "tokenizer, train.init_from" in told["not_measured"]
    assert told["clips"] is None  # of either corpus: nobody knows how often its turn comes
    assert told["parameters_by_part"]["text_encoder"] > 30522 * 32  # the sizes of the config all the same
    assert "memory_megabytes" not in told  # without the teacher there is nothing to pass forward


def test_files_that_are_here_have_their_size_and_licence(tiny, unbroken, tmp_path):
    card = json.loads((unbroken / "model" / "card.json").read_text())
    (unbroken / "model" / "card.json").write_text(json.dumps(card | {"licence": "CC0-1.0"}))
    config = tiny(f"train.init_from={unbroken}/model", "evaluation.every=0")
    (start,) = needed_files(config)
    size = sum(path.stat().st_size for path in (unbroken / "model").iterdir()) / 1e6
    assert start.present and start.licence == "CC0-1.0" and start.megabytes == pytest.approx(size, abs=1e-3)
    assert estimate(config)["hours"] > 0


def test_updates_of_each_corpus_are_counted_and_timed(mixed):
    """10 updates: the 8 of an epoch, which test_mixture has by name, and the first of a second."""
    config = mixed("train.accumulate=2")
    model = make_model(config, make_tokenizer(config), CPU)
    clips, turns = Counter(), Counter()
    with open_source(config, model, 0) as batches:
        for batch in itertools.islice(batches, 20):
            clips[batch.corpus] += len(batch.video)
            turns[batch.corpus] += 1
    told = estimate(config)
    assert told["clips"] == clips.total()
    assert {kind["corpus"]: kind["count"] * kind["batch_size"] for kind in told["updates"]} == clips
    assert {kind["corpus"]: 2 * kind["count"] for kind in told["updates"]} == turns
    assert {kind["corpus"]: kind["num_frames"] for kind in told["updates"]} == {
        "few": 8, "many": 8, "pictures": 1,
    }  # fmt: skip
    assert {kind["corpus"]: kind["timed_clips"] for kind in told["updates"]} == {
        "few": 1, "many": 2, "pictures": 3,
    }  # fmt: skip
    frame_megabytes = 4 * 3 * 64 * 64 / 1e6
    assert told["memory_megabytes"]["batch"] == pytest.approx(4 * 8 * frame_megabytes, abs=0.05)
    # without workers an update waits for its data
    hours = sum(
        kind["count"] * (max(kind["step_seconds"]) + kind["data_seconds"]) for kind in told["updates"]
    )
    assert told["hours"] == pytest.approx(hours / 3600, rel=0.02)
    assert [file["key"] for file in told["files"]] == [
        f"data.shards.corpora.{name}.folders" for name in ("few", "many", "pictures")
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_too_slow_to_time_is_timed_in_part(tiny, monkeypatch, workers):
    monkeypatch.setattr("vlm.training.planning.estimate._PATIENCE_S", 0.0)
    options = ("train.batch_size=32", "train.accumulate=2", "evaluation.every=0")
    told = estimate(tiny(*options, f"data.workers={workers}"))
    (found,) = told["updates"]
    assert found["timed_clips"] == 8
    steps, data_s = max(found["step_seconds"]), found["data_seconds"]
    together = max(steps, data_s) if workers else steps + data_s
    assert found["clips_per_second"] == pytest.approx(32 / together, rel=0.02)


def test_the_command_prints_the_whole_config(tiny, capsys):
    from vlm.config import build as build_config
    from vlm.training.config import TrainingConfig

    assert main(["train", str(tiny.path), "--set", "train.max_steps=3", "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert build_config(TrainingConfig, told["config"]) == tiny("train.max_steps=3")


def test_a_classifier_without_its_labels_has_no_sizes(tiny, tmp_path):
    settings = yaml.safe_dump(
        {"source": "files", "files": {"train": f"{tmp_path}/none.csv", "videos": str(tmp_path)}},
        default_flow_style=True,
    )
    told = estimate(tiny(f"classification={settings}", "evaluation.every=0"))
    assert "classes are unknown without classification.files.train" in told["not_measured"]
    assert told["missing"] == ["classification.files.train"] and "parameters" not in told
