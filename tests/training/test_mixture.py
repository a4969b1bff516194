"""Runs on videos and pictures by turns: one order, one log, whatever the processes and the stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlm.data.shards.layout import read_manifest, write_manifest
from vlm.errors import ConfigError, DataError
from vlm.training.checkpoint import load_tensors
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import make_model, make_objective, make_tokenizer
from vlm.training.sources.config import CorpusConfig, ShardsConfig
from vlm.training.sources.opening import open_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
    """Where the unbroken run lies, made by the first test that asks for it."""
    return tmp_path_factory.mktemp("whole") / "run"


def unbroken(mixed, whole):
    if not (whole / "model").exists():
        train(mixed(), whole)
    return whole


def tensors(value, name=""):
    """Yield every tensor of nested dicts and lists, with its place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from tensors(inner, f"{name}/{key}")


def assert_equal(run, reference):
    """Weights, optimiser and log are equal to the bit."""
    states = []
    for folder in (run, reference):
        newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
        saved = load_tensors(newest / "engine.pt"), load_file(folder / "model" / "model.safetensors")
        states.append(dict(tensors(saved)))
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def take(config, count, start=0):
    model = make_model(config, make_tokenizer(config), CPU)
    with open_source(config, model, start) as batches:
        return [next(batches) for _ in range(count)], model


def test_each_update_sees_one_medium_and_each_sample_comes_once_a_pass(mixed):
    """2 batches of pictures, 2 of the many and 4 of the few make the first epoch."""
    batches, _ = take(mixed(), 8)
    shapes = Counter((batch.corpus, tuple(batch.video.shape[:2])) for batch in batches)
    assert shapes == {("pictures", (6, 1)): 2, ("many", (4, 8)): 2, ("few", (2, 8)): 4}
    keys = {
        name: [key for batch in batches if batch.corpus == name for key in batch.keys]
        for name in ("pictures", "many", "few")
    }
    for name, count in (("pictures", 7), ("many", 6), ("few", 5)):
        assert sorted(keys[name][:count]) == [f"{name}/0/{number}" for number in range(count)]
    assert all(batch.text.input_ids.shape[0] == len(batch.video) for batch in batches)
    again, _ = take(mixed("data.workers=2"), 3, start=5)
    for one, other in zip(batches[5:], again, strict=True):
        assert one.keys == other.keys and torch.equal(one.video, other.video)


def test_equal_ids_of_two_folders_are_two_videos(sets, mixed):
    """Clip 3 of one folder is not clip 3 of the other, in one batch too."""
    both = f"{{both: {{folders: [{sets / 'many'}, {sets / 'few'}], batch_size: 11}}}}"
    config = mixed("data.shards.random_frames=false")
    values = yaml.safe_load(mixed.path.read_text())
    values["data"]["shards"]["corpora"] = yaml.safe_load(both)
    mixed.path.write_text(yaml.safe_dump(values))
    config = mixed()
    (batch,), _ = take(config, 1)
    assert len(set(batch.keys)) == 11 and {"both/0/3", "both/1/3"} < set(batch.keys)
    texts = batch.text.input_ids.tolist()
    equal = torch.tensor([[one == other for other in texts] for one in texts])
    assert torch.equal(batch.positives, equal)
    assert batch.corpus == ""


def test_templates_are_read_and_leave_the_truth_as_it_is(mixed):
    plain, model = take(mixed(), 8)
    worded, _ = take(mixed("data.shards.corpora.pictures.templates=['the {} here']"), 8)
    longer = 0
    for one, other in zip(plain, worded, strict=True):
        assert torch.equal(one.positives, other.positives) and torch.equal(one.video, other.video)
        assert (one.corpus == "pictures") != torch.equal(one.text.input_ids, other.text.input_ids)
        longer += other.text.input_ids.shape[1] == one.text.input_ids.shape[1] + 2
    assert longer == 2
    the, here = model.tokenize(["the"]).input_ids[0, 1], model.tokenize(["here"]).input_ids[0, 1]
    (first, *_) = [batch.text for batch in worded if batch.corpus == "pictures"]
    assert (first.input_ids[:, 1] == the).all()
    ends = first.attention_mask.sum(dim=1) - 2
    assert (first.input_ids.gather(1, ends[:, None]) == here).all()


def test_pictures_know_nothing_of_time(mixed):
    """No picture reads the table of times, every video does; a video that stands still is no picture."""
    batches, model = take(mixed(), 8)
    config = mixed()
    objective = make_objective(config, model)
    times = model.vision_encoder.temporal_pos_embedding
    for batch in batches:
        times.grad = None
        loss, _ = objective(batch, 0)
        loss.backward()
        if batch.corpus == "pictures":
            assert times.grad is None or not times.grad.any()
        else:
            assert times.grad.any()
    picture = next(batch for batch in batches if batch.corpus == "pictures").video
    with torch.no_grad():
        times += 1.0
        alone = model.encode_video(picture).embedding
        still = model.encode_video(picture.expand(-1, 8, -1, -1, -1)).embedding
        times -= 1.0
        assert torch.equal(model.encode_video(picture).embedding, alone)
        assert not torch.allclose(alone, still)


def test_the_log_says_which_corpus_a_loss_is_of(mixed, whole):
    lines = read_lines(unbroken(mixed, whole) / "metrics.jsonl")
    names = [next(name for name in line if name.startswith("loss/")) for line in lines]
    assert Counter(names[:8]) == {"loss/pictures": 2, "loss/many": 2, "loss/few": 4}
    assert all(line[name] == line["loss"] for line, name in zip(lines, names, strict=True))
    expected, _ = take(mixed(), 10)
    assert [f"loss/{batch.corpus}" for batch in expected] == names


def test_an_update_in_parts_sees_the_clips_of_a_whole_one(mixed, tmp_path):
    """Of one corpus, in the same order; and its turn does not depend on the parts."""
    updates, _ = take(mixed("train.max_steps=8"), 8)
    parts, _ = take(mixed("train.accumulate=2"), 16)
    for number, update in enumerate(updates):
        pair = parts[2 * number : 2 * number + 2]
        assert [part.corpus for part in pair] == [update.corpus] * 2
        assert [len(part.video) for part in pair] == [len(update.video) // 2] * 2
        assert sum((part.keys for part in pair), ()) == update.keys
        assert torch.equal(torch.cat([part.video for part in pair]), update.video)
    train(mixed("train.accumulate=2"), tmp_path / "whole")
    train(mixed("train.accumulate=2", "train.max_steps=3"), tmp_path / "broken")
    train(mixed("train.accumulate=2"), tmp_path / "broken", resume=True)
    assert_equal(tmp_path / "broken", tmp_path / "whole")
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert all(f"loss/{update.corpus}" in line for update, line in zip(updates, lines, strict=False))
    with pytest.raises(ConfigError, match="few.batch_size 2 is not a multiple .* in each of 4 parts"):
        take(mixed("train.accumulate=4"), 1)


def test_a_mixed_run_resumes_to_the_bit_at_any_step(mixed, whole, tmp_path):
    reference = unbroken(mixed, whole)
    run = tmp_path / "run"
    for stop in (1, 4, 7):
        train(mixed(f"train.max_steps={stop}", "checkpoint.every=1"), run, resume=run.exists())
    train(mixed("data.workers=2", "checkpoint.every=1"), run, resume=True)
    assert_equal(run, reference)


def test_a_mixed_run_that_was_killed_goes_on_to_the_bit(mixed, whole, tmp_path, launch):
    reference, run = unbroken(mixed, whole), tmp_path / "run"
    arguments = ["train", str(mixed.path), "--set", "data.workers=1"]
    process = launch(*arguments, "--out", str(run))
    end = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = launch(*arguments, "--resume", str(run))
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert_equal(run, reference)


def test_two_processes_log_what_one_logs(mixed, whole, tmp_path, launch):
    process = launch("train", str(mixed.path), "--out", str(tmp_path / "run"), processes=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    lines, expected = (
        read_lines(run / "metrics.jsonl") for run in (tmp_path / "run", unbroken(mixed, whole))
    )
    assert len(lines) == len(expected) == 10
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-4)  # by the order of sums


# --- what cannot be mixed


def corpora(sets, **changes):
    names = {"clips": CorpusConfig(folders=(str(sets / "many"),))}
    return ShardsConfig(corpora=names | {name: CorpusConfig(**wanted) for name, wanted in changes.items()})


@pytest.mark.parametrize(
    ("folders", "media", "message"),
    [
        (["pictures"], "video", "corpora.other: .*pictures holds media: image, not media: video"),
        (["few"], "image", "corpora.other: .*few holds media: video, not media: image"),
        (["few", "pictures"], "video", "pictures holds media: image"),
        (["few", "few"], "video", "few holds the samples of .*few of corpus other again; name it once"),
        (["many"], "video", "many holds the samples of .*many of corpus "),
        (["copy"], "video", "copy holds the samples of .*many of corpus "),
    ],
)
def test_folders_that_do_not_fit(sets, folders, media, message):
    from vlm.training.sources.shards import open_corpora

    if not (sets / "copy").exists():
        shutil.copytree(sets / "many", sets / "copy")
    wanted = {"folders": tuple(str(sets / folder) for folder in folders), "media": media}
    with pytest.raises(ConfigError, match=message):
        open_corpora(corpora(sets, other=wanted))


def test_a_batch_is_shared_evenly_by_all_processes(sets, monkeypatch):
    from vlm import distributed
    from vlm.training.sources.shards import open_corpora

    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    open_corpora(corpora(sets, other={"folders": (str(sets / "few"),), "batch_size": 8}))
    with pytest.raises(ConfigError, match="corpora.other.batch_size 6 is not a multiple of the 4 processes"):
        open_corpora(corpora(sets, other={"folders": (str(sets / "few"),), "batch_size": 6}))


def test_an_empty_corpus_is_named(sets, mixed, tmp_path):
    from dataclasses import replace

    write_folder = tmp_path / "empty"
    write_folder.mkdir()
    manifest = replace(read_manifest(sets / "many"), shards=(), num_samples=0, num_bytes=0)
    write_manifest(write_folder, manifest)
    config = mixed(f"data.shards.corpora.void.folders=[{write_folder}]")
    model = make_model(config, make_tokenizer(config), CPU)
    message = "corpus 'void': the data set holds no sample"
    with pytest.raises(DataError, match=message), open_source(config, model, 0):
        pass


def test_a_picture_that_broke_is_counted_where_it_is(sets, mixed, tmp_path, capsys):
    """Broken after it was packed, by one who wrote valid checksums: only decoding tells."""
    from vlm.cli import main
    from vlm.data.shards import ShardReader, ShardWriter

    reader = ShardReader(sets / "pictures")
    writer = ShardWriter(tmp_path / "torn", {}, media="image")
    for number in range(7):
        raw = reader.read(0, number)
        data = raw.members["png"]
        writer.add(raw.key, {**raw.members, "png": data[: len(data) // 2] if number == 2 else data})
    writer.finish()
    folder = f"data.shards.corpora.pictures.folders=[{tmp_path / 'torn'}]"
    command = ["train", str(mixed.path), "--set", folder, "--out", str(tmp_path / "run")]
    assert main(command) == 4
    assert "corpus 'pictures': 1 of 7 samples cannot be used (damaged 1)" in capsys.readouterr().err
    command = [*command[:-1], str(tmp_path / "other"), "--set", "data.shards.max_bad_fraction=0.2"]
    assert main(command) == 3
    printed = capsys.readouterr().err
    assert "1 samples were rejected" in printed and "(pictures damaged 1)" in printed
    rows = [json.loads(row) for row in (tmp_path / "other" / "rejected-0.jsonl").read_text().splitlines()]
    assert {(row["corpus"], row["key"], row["reason"]) for row in rows} == {("pictures", "2", "damaged")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.shards.corpora.few.weight=0", "weight must be finite and above 0"),
        ("data.shards.corpora.few.media=film", "expected one of 'video', 'image'"),
        ("data.shards.corpora.few.folders=[]", "folders must name at least one folder"),
        ("data.shards.corpora.few.batch_size=0", "batch_size at least 1"),
        ("data.shards.corpora.few.templates=[a video]", "must each hold one {}"),
        ("data.shards.corpora={a/b: {folders: [x]}}", "expected names of letters and digits"),
        ("data.shards.folders=[x]", "unknown key 'folders'"),
    ],
)
def test_impossible_corpora_are_refused(mixed, change, message):
    from vlm.errors import UsageError

    with pytest.raises(UsageError, match=message):
        mixed(change)


def test_a_changed_mixture_does_not_resume(mixed, whole):
    with pytest.raises(ConfigError, match="data.shards.corpora"):
        train(mixed("data.shards.corpora.few.weight=2"), unbroken(mixed, whole), resume=True)
