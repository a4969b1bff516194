"""Shards packed with labels feed a classifier as loose files do: same videos, same labels, same keys."""

from __future__ import annotations

import json

import pytest
import torch

from vlm.cli import main
from vlm.data.annotations.labels import read_labelled
from vlm.data.packing import pack
from vlm.data.shards.reader import ShardReader
from vlm.data.sources import LabelledShards, ShardSource
from vlm.errors import ConfigError, DataError
from vlm.models import load_model
from vlm.training.classification.setup import open_set
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import make_model

NAMES = ("black", "dark", "grey", "bright")


@pytest.fixture(scope="module")
def packed(clips, tmp_path_factory):
    """Both files of labels as shards, by the command."""
    folder = tmp_path_factory.mktemp("packed")
    for part in ("train", "val"):
        command = ["data", "pack", "--annotations", str(clips / f"{part}.csv"), "--layout", "lines"]
        command += ["--classes", str(clips / "classes.txt"), "--videos", str(clips)]
        assert main([*command, "--out", str(folder / part)]) == 0
    return folder


@pytest.fixture
def sharded(files, packed):
    def make(*overrides):
        paths = [f"classification.files.{part}={packed / part}" for part in ("train", "val")]
        return files(
            *paths, "classification.files.videos=''", "classification.files.classes=null", *overrides
        )

    return make


def contents(source):
    found = {}
    for shard, size in enumerate(source.shard_sizes):
        for number in range(size):
            sample = source.load(shard, number, lambda available: [0, available - 1])
            found[int(sample.key[2:4].strip("_"))] = (sample.frames.tobytes(), sample.metadata["label"])
    return found


def test_labels_and_frames_are_those_of_the_files(files, sharded, packed):
    for part in ("train", "val"):
        loose = open_set(files().classification.files, part)
        shards = open_set(sharded().classification.files, part)
        assert shards.classes == loose.classes == NAMES
        assert contents(shards) == contents(loose) and len(contents(loose)) in (4, 8)
    facts = json.loads(ShardReader(packed / "train").read(0, 1).members["json"])
    assert (facts["label"], facts["captions"], facts["video"]) == (1, ["dark"], "v 01.mp4")


def test_a_run_from_shards_resumes_to_the_bit_and_knows_its_classes(sharded, tmp_path):
    train(sharded("data.workers=2"), tmp_path / "whole")
    train(sharded("train.max_steps=4"), tmp_path / "run")
    train(sharded(), tmp_path / "run", resume=True)
    whole, run = (tmp_path / name / "metrics.jsonl" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes()
    assert "val/top1" in read_lines(run)[-1]
    assert load_model(tmp_path / "run" / "model").config.class_names == NAMES


def test_classes_are_joined_by_name_whatever_their_numbers(files, packed, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("bright\nblack\nmore\ngrey\ndark\n")
    shards = f"classification.files.train={packed / 'train'}"
    settings = files(shards, f"classification.files.classes={order}").classification.files
    expected = {number: (1, 4, 3, 0)[number % 4] for number in range(12)}
    for part in ("train", "val"):
        found = open_set(settings, part)  # the first from shards, the other from files
        if part == "train":
            assert {key: label for key, (_, label) in contents(found).items()} == {
                number: expected[number] for number in range(8)
            }
        assert found.classes == ("bright", "black", "more", "grey", "dark")


def test_shards_that_cannot_teach(files, clips, packed, tmp_path):
    plain = tmp_path / "plain"
    entries = read_labelled(clips / "train.csv", clips).annotations()
    pack(entries, clips, plain)
    with pytest.raises(DataError, match="hold no labels; pack them with") as caught:
        LabelledShards(ShardSource(plain))
    assert caught.value.reason == "no_labels"
    with pytest.raises(DataError, match="know the class 'black', which is none of the 2"):
        LabelledShards(ShardSource(packed / "train"), ("bright", "grey"))
    wrong = tmp_path / "wrong"
    pack(entries, clips, wrong, classes=("one",))  # labels 0 to 3
    source = LabelledShards(ShardSource(wrong))
    source.load(0, 0, lambda available: [0])
    with pytest.raises(DataError, match="a label below 1, got 1") as caught:
        source.load(0, 1, lambda available: [0])
    assert caught.value.reason == "bad_metadata"
    with pytest.raises(ConfigError, match="classification.files.videos is needed"):
        make_model(files("classification.files.videos=''"), None, torch.device("cpu"))


def test_pictures_with_labels_teach_a_model_of_one_frame(files, clips, tmp_path):
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (64, 64), (60 * (number % 4), 40, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,{number % 4}\n" for number in range(8)))
    command = ["data", "pack", "--annotations", str(tmp_path / "labels.csv"), "--layout", "lines"]
    command += ["--videos", str(tmp_path), "--media", "image", "--out", str(tmp_path / "shards")]
    assert main(command) == 0
    pictures = ["classification.files.val=null", "classification.files.classes=null", "evaluation.every=0"]
    pictures += [f"classification.files.train={tmp_path / 'shards'}", "train.max_steps=2"]
    with pytest.raises(ConfigError, match="holds pictures; set model.vision.num_frames to 1"):
        train(files(*pictures), tmp_path / "videos")
    train(files(*pictures, "model.vision.num_frames=1"), tmp_path / "run")
    assert load_model(tmp_path / "run" / "model")(torch.zeros(1, 1, 3, 64, 64)).shape == (1, 4)
