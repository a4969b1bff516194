"""Runs from beginning to end: resuming to the bit, killing, refusing, learning."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from vlm.errors import ConfigError, InvalidInput, VlmError
from vlm.training.checkpoint import load_tensors
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines, training_s


def final_state(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_tensors(newest / "engine.pt"), load_file(run / "model" / "model.safetensors")


def assert_equal_trees(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_trees(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal_trees(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_run_leaves_what_the_readme_promises(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "speed.jsonl", "curves.png", "model"} <= names
    lines = read_lines(unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    parts = {"contrastive", "matching", "masked_language"}
    for line in lines:
        assert parts <= line.keys()
        expected = line["contrastive"] + line["matching"] + 0.2 * line["masked_language"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert {"val/r1", "val/r5", "val/pair_r1", "val/direction"} <= lines[1].keys()
    assert "val/r1" not in lines[2]
    assert (unbroken / "curves.png").read_bytes().startswith(b"\x89PNG")
    speed = read_lines(unbroken / "speed.jsonl")[-1]
    assert speed["samples_per_s"] > 0 and 0 <= speed["data_wait"] <= 1
    kept = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000004", "step-00000006"]
    assert (unbroken / "checkpoints" / "latest").read_text() == "step-00000006"


def test_the_model_folder_loads_with_its_abilities(unbroken):
    from vlm.models import load_model

    model = load_model(unbroken / "model")
    assert model.domain == "digit-world" and model.capabilities == {"search", "rerank", "choose"}
    checkpoint = load_model(unbroken / "checkpoints" / "step-00000006" / "model")
    assert_equal_trees(dict(model.state_dict()), dict(checkpoint.state_dict()))


def test_equal_seeds_give_equal_logs_and_workers_change_nothing(unbroken, tiny, tmp_path):
    train(tiny("data.workers=1"), tmp_path / "again")
    for name in ("metrics.jsonl",):
        assert (tmp_path / "again" / name).read_bytes() == (unbroken / name).read_bytes()
    train(tiny("seed=1", "train.max_steps=1", "evaluation.every=0"), tmp_path / "other")
    first = read_lines(tmp_path / "other" / "metrics.jsonl")[0]
    assert first["loss"] != read_lines(unbroken / "metrics.jsonl")[0]["loss"]


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(unbroken, tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny("train.max_steps=4"), run)
    with (run / "metrics.jsonl").open("a") as log:  # as after a crash between two checkpoints
        log.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    train(tiny(), run, resume=True)
    for one, other in zip(final_state(run), final_state(unbroken), strict=True):
        assert_equal_trees(one, other)
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(unbroken, tiny, tmp_path, caplog):
    run = tmp_path / "run"
    train(tiny("train.max_steps=4"), run)
    newest = run / "checkpoints" / "step-00000004" / "engine.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train(tiny(), run, resume=True)
    assert "step-00000004: engine.pt does not match its checksum" in caplog.text
    assert_equal_trees(final_state(run), final_state(unbroken))


def test_a_finished_run_resumes_to_nothing(unbroken, tiny, tmp_path):
    before = (unbroken / "metrics.jsonl").read_bytes()
    started = json.loads((unbroken / "environment.json").read_text())
    started["command"] = ["vlm", "train", "what it was started with"]
    (unbroken / "environment.json").write_text(json.dumps(started))
    train(tiny(), unbroken, resume=True)
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    training = json.loads((unbroken / "model" / "card.json").read_text())["training"]
    assert training["command"] == started["command"] and training["steps"] == tiny().train.max_steps


def test_the_time_of_a_run_counts_every_update_once(tmp_path):
    lines = [{"step": 10, "step_s": 0.5}, {"step": 14, "step_s": 2.0}, {"step": 20, "step_s": 1.0}]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_s(tmp_path) == 10 * 0.5 + 4 * 2.0 + 6 * 1.0


def test_a_changed_config_is_refused_with_what_changed(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny("train.max_steps=1", "evaluation.every=0"), run)
    with pytest.raises(ConfigError, match="\n  seed: 0 -> 3\n  optimizer.learning_rate: 0.002 -> 0.1\n"):
        train(tiny("optimizer.learning_rate=0.1", "seed=3"), run, resume=True)
    with pytest.raises(ConfigError, match="train.max_steps .it ends the decay"):
        other = tmp_path / "other"
        train(tiny("train.max_steps=1", "optimizer.decay_steps=null", "evaluation.every=0"), other)
        train(
            tiny("train.max_steps=2", "optimizer.decay_steps=null", "evaluation.every=0"), other, resume=True
        )


def test_an_existing_run_is_not_overwritten_and_a_missing_one_not_resumed(unbroken, tiny, tmp_path):
    with pytest.raises(InvalidInput, match="holds a run already"):
        train(tiny(), unbroken)
    with pytest.raises(InvalidInput, match="no run to resume"):
        train(tiny(), tmp_path / "nowhere", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    message = r"step \d+: .* not finite .*first of all .* of model.*start a new run with --out and a lower"
    with pytest.raises(VlmError, match=message) as caught:
        train(
            tiny(
                "optimizer.learning_rate=1e30",
                "optimizer.clip_norm=0",
                "evaluation.every=0",
                "checkpoint.every=1",
            ),
            tmp_path / "run",
        )
    assert "stop" not in str(caught.value).partition("not finite")[2]
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert str(caught.value).endswith(f"train.init_from={saved}")


def test_a_config_that_cannot_begin_leaves_nothing_in_the_way(tiny, unbroken, tmp_path):
    with pytest.raises(InvalidInput, match="no model is named"):
        train(tiny("train.init_from=./modle", "train.max_steps=1"), tmp_path / "run")
    train(tiny(f"train.init_from={unbroken}/model", "train.max_steps=1"), tmp_path / "run")


@pytest.mark.parametrize(
    ("others", "own", "expected"),
    [([0, 0], 0, 0), ([15, 0], 0, 15), ([0, 2], 0, 2), ([0, 0], 15, 15), ([2, 2], 2, 2), ([15, 2], 2, 15)],
)
def test_processes_agree_on_one_of_the_signals_that_came(monkeypatch, others, own, expected):
    from vlm.training import loop

    given = []
    for number in (own, *others):  # what each of them has to say, before it is summed
        monkeypatch.setattr(loop.distributed, "all_sum", lambda tensor: given.append(tensor) or tensor)
        assert loop._mean_over_processes({"loss": torch.tensor(3.0)}, number)["stop"] == number
    monkeypatch.setattr(loop.distributed, "all_sum", lambda tensor: sum(given))
    monkeypatch.setattr(loop.distributed, "world_size", lambda: len(given))
    assert loop._mean_over_processes({"loss": torch.tensor(3.0)}, own) == {"loss": 3.0, "stop": expected}


def wait_for(path, process, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_kill_9_then_resume_equals_an_unbroken_run(unbroken, tiny, tmp_path, launch):
    run = tmp_path / "run"
    arguments = ["train", str(tiny.path), "--set", "data.workers=1"]
    process = launch(*arguments, "--out", str(run))
    wait_for(run / "checkpoints" / "step-00000002", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = launch(*arguments, "--resume", str(run))
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert out.strip() == str(run / "model")
    assert_equal_trees(final_state(run), final_state(unbroken))
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tiny, tmp_path, launch, number, code):
    run = tmp_path / "run"
    overrides = [
        "--set",
        "train.max_steps=100000",
        "--set",
        "checkpoint.every=100000",
        "--set",
        "evaluation.every=0",
    ]
    process = launch("train", str(tiny.path), *overrides, "--out", str(run))
    wait_for(run / "metrics.jsonl", process)
    while not (run / "metrics.jsonl").read_text():
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does: to the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"continue with vlm train CONFIG --resume {run}" in err
    (saved,) = (run / "checkpoints").glob("step-*")
    done = json.loads((saved / "manifest.json").read_text())["step"]
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == done


@pytest.mark.slow
def test_the_contrastive_loss_falls_below_chance(tiny, tmp_path):
    """It starts at log(batch size), which is chance, and must leave it behind within 160 steps."""
    settings = {
        "train.max_steps": 160,
        "train.batch_size": 16,
        "optimizer": "{learning_rate: 2.0e-3, warmup_steps: 10, final_ratio: 1.0}",
        "losses": "{matching: {weight: 0}}",
        "data.world.grouped": 0,
        "evaluation.every": 0,
        "checkpoint.every": 1000,
    }
    train(tiny(*(f"{key}={value}" for key, value in settings.items())), tmp_path / "run")
    losses = [line["contrastive"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 2.75  # log(16) = 2.77
    assert sum(losses[-20:]) / 20 < 2.7
