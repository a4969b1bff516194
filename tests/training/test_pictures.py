"""Updates of single pictures between those of clips: which they are, what they show, what they cost."""

import numpy as np
import pytest
import torch

from vlm.errors import ConfigError, UsageError
from vlm.models import load_model
from vlm.training.loop import train
from vlm.training.planning.updates import only, update_kinds
from vlm.training.setup import make_model, make_objective, make_tokenizer
from vlm.training.sources.config import PicturesConfig
from vlm.training.sources.opening import open_source
from vlm.training.sources.pictures import PICTURE_WORDS, draw_picture
from vlm.training.studies.flops import flops_of
from vlm.world import render, sample_scene
from vlm.world.scene import COLOURS

CPU = torch.device("cpu")
THIRD = ("data.world.pictures.every=3", "data.world.pictures.batch_size=12")


def batches_of(config, count, start=0):
    model = make_model(config, make_tokenizer(config), CPU)
    with open_source(config, model, start) as batches:
        return [next(batches) for _ in range(count)]


def test_turns_worked_by_hand():
    assert [PicturesConfig(every=3).are_in(update) for update in range(7)] == [0, 0, 1, 0, 0, 1, 0]
    assert not any(PicturesConfig().are_in(update) for update in range(5))
    assert all(PicturesConfig(every=1).are_in(update) for update in range(5))
    for wrong in ({"every": -1}, {"every": 2, "batch_size": 0}):
        with pytest.raises(ValueError, match=r"data\.world\.pictures"):
            PicturesConfig(**wrong)


def test_a_picture_shows_the_thing_that_its_caption_names():
    for number in range(60):
        scene, frame, name, caption = draw_picture("train", 3, number, np.random.default_rng(number))
        (thing,) = scene.things
        assert name == (thing.colour, thing.digit)
        assert caption.split()[-2:] == [thing.colour, str(thing.digit)]
        assert len(caption.split()) <= PICTURE_WORDS
        assert scene.events == () and thing in sample_scene("train", 3, number).things
        picture = render(scene, [frame])[0].astype(float)
        colour = np.array(COLOURS[thing.colour], dtype=float)
        near = np.abs(picture - colour).max(axis=-1) < 60
        assert near.sum() >= 15, (number, frame)
    with pytest.raises(ValueError, match="expected a split"):
        draw_picture("nowhere", 0, 0, np.random.default_rng(0))


def test_every_third_update_is_of_pictures_and_the_others_are_what_they_were(tiny):
    mixed, plain = batches_of(tiny(*THIRD), 6), batches_of(tiny(), 6)
    assert [batch.video.shape[1] for batch in mixed] == [8, 8, 1, 8, 8, 1]
    for place in (0, 1, 3, 4):
        assert torch.equal(mixed[place].video, plain[place].video)
    first, second = mixed[2], mixed[5]
    assert len(first.video) == 12 and first.positives.shape == (12, 12)
    assert set(first.keys).isdisjoint(second.keys) and len(set(first.keys)) == 12
    assert torch.equal(first.siblings, torch.eye(12, dtype=torch.bool))
    words = [ids[mask.bool()].tolist()[-3:-1] for ids, mask in zip(*first.text, strict=True)]
    assert first.positives.tolist() == [[one == other for other in words] for one in words]
    (again,) = batches_of(tiny(*THIRD), 1, start=5)  # resumed at its place
    assert torch.equal(again.video, second.video) and torch.equal(again.text.input_ids, second.text.input_ids)


def test_parts_and_processes_divide_pictures(tiny, monkeypatch):
    (whole,) = batches_of(tiny(*THIRD), 1, start=2)
    parts = batches_of(tiny(*THIRD, "train.accumulate=2"), 2, start=2)
    assert [batch.video.shape[:2] for batch in parts] == [(6, 1), (6, 1)]
    assert [key for batch in parts for key in batch.keys] == list(whole.keys)
    monkeypatch.setattr("vlm.distributed.world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("vlm.distributed.rank", lambda rank=rank: rank)
        shares += batches_of(tiny(*THIRD), 1, start=2)
    assert torch.equal(torch.cat([share.video for share in shares]), whole.video)
    assert [share.offset for share in shares] == [0, 6]
    with pytest.raises(ConfigError, match=r"data\.world\.pictures\.batch_size 13 is not a multiple of the 2"):
        batches_of(tiny("data.world.pictures.every=3", "data.world.pictures.batch_size=13"), 1)


def test_a_run_with_pictures_goes_on_bit_for_bit(tiny, tmp_path):
    settings = (*THIRD, "train.max_steps=6", "optimizer.decay_steps=6", "checkpoint.every=2")
    train(tiny(*settings), tmp_path / "whole")
    train(tiny(*settings, "train.max_steps=4"), tmp_path / "halves")
    train(tiny(*settings), tmp_path / "halves", resume=True)
    whole, halves = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "halves/metrics.jsonl").read_text()


def test_updates_are_counted_by_kind(tiny):
    config = tiny(*THIRD, "train.max_steps=8")
    clips, pictures = update_kinds(config, opens=False)
    assert (clips.corpus, clips.count, clips.num_frames) == ("", 6, 8)
    assert (pictures.corpus, pictures.count, pictures.batch_size, pictures.num_frames) == (
        "pictures",
        2,
        12,
        1,
    )
    (batch,) = batches_of(only(config, pictures), 1)
    assert batch.video.shape[:2] == (12, 1)
    (batch,) = batches_of(only(config, clips), 1, start=2)
    assert batch.video.shape[:2] == (config.train.batch_size, 8)
    labelled = tiny("classification={}", "data.source=shards", "data.shards.corpora={a: {folders: [x]}}",
                    "evaluation.best=top1")  # fmt: skip
    (kind,) = update_kinds(labelled, opens=False)  # a classifier's clips are of no corpus
    assert only(labelled, kind).data.shards == labelled.data.shards
    (every,) = update_kinds(tiny("data.world.pictures.every=1"), opens=False)
    assert every.corpus == "pictures"


def test_pictures_need_a_loss_of_their_own(tiny):
    whole = (
        "losses.alignment.picture_ratio=null",
        "losses.matching.weight=0",
        "losses.masked_language.weight=0",
    )
    tiny(*THIRD, *whole)
    tiny(*whole, "losses.contrastive.weight=[[2, 0], [3, 1]]", "losses.alignment.weight=1",
         "losses.alignment.teacher=demo")  # fmt: skip
    with pytest.raises(UsageError, match=r"picture_ratio is null.* none of them is above 0 at step 0"):
        tiny(*THIRD, *whole, "losses.contrastive.weight=[[2, 0], [3, 1]]", "losses.alignment.weight=1",
             "losses.alignment.teacher=demo")  # fmt: skip


def test_operations_are_those_of_both_kinds(tiny):
    plain = ("losses.matching.weight=0", "losses.masked_language.weight=0", "losses.contrastive.weight=1")
    size = "data.world.pictures.batch_size=12"
    mixed = flops_of([tiny(*plain, *THIRD, "train.max_steps=6")])
    clips = flops_of([tiny(*plain, "train.max_steps=4")])
    pictures = flops_of([tiny(*plain, "data.world.pictures.every=1", size, "train.max_steps=2")])
    assert mixed == pytest.approx(clips + pictures, rel=0.02)  # texts differ a little in length
    assert 0.05 < pictures / mixed < 0.25  # twelve pictures of 4 + 1 tokens, eight clips of 8 * 4 + 1


def test_pictures_can_be_left_whole(tiny):
    settings = ("losses.alignment.weight=1", "losses.alignment.teacher=demo", "losses.alignment.mask=tube",
                "model.vision.alignment_width=128", "model.vision.patch_size=16")  # fmt: skip
    seen = {}
    for ratio in ("0.5", "null"):
        config = tiny(*THIRD, *settings, f"losses.alignment.picture_ratio={ratio}")
        model = make_model(config, make_tokenizer(config), CPU)
        objective = make_objective(config, model)
        with open_source(config, model, 1) as batches:
            seen[ratio] = [set(objective(next(batches), number)[1]) for number in (1, 2)]
    assert seen["0.5"][0] == seen["null"][0] == seen["0.5"][1]  # a clip is masked in any case
    assert seen["null"][1] == seen["0.5"][1] - {"alignment"}
