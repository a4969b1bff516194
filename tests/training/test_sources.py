"""Batches: pure functions of seed and step, alike for any number of processes, with exact truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm.data.preprocessing import preprocess
from vlm.models import EncoderConfig, EncoderModel
from vlm.training.setup import make_model, make_tokenizer
from vlm.training.sources.config import WorldConfig
from vlm.training.sources.opening import open_source
from vlm.training.sources.shards import _Facts, relations
from vlm.training.sources.world import WorldBatches, compose, render_clip, to_input
from vlm.world import caption, facts, has_twin, is_true, render, sample_frames, sample_scene, twin


@pytest.fixture
def parts(tiny):
    """Return a function that gives process ``rank`` of ``world_size``'s batches."""
    config = tiny()
    model = make_model(config, make_tokenizer(config), torch.device("cpu"))

    def make(rank=0, world_size=1, seed=0):
        return WorldBatches(
            config.data.world,
            seed=seed,
            batch_size=8,
            rank=rank,
            world_size=world_size,
            preprocessing=model.preprocessing,
            tokenizer=model.tokenizer.to_json(),
            max_words=64,
        )

    return make


def test_processes_hold_parts_of_the_same_global_batch(parts):
    whole = parts()[5]
    halves = [parts(rank, 2)[5] for rank in (0, 1)]
    for name in ("frames", "input_ids", "attention_mask"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert halves[0].keys + halves[1].keys == whole.keys
    for half in halves:
        assert torch.equal(half.positives, whole.positives) and torch.equal(half.siblings, whole.siblings)


def test_steps_and_seeds_differ_and_repeat(parts):
    batches = parts()
    assert torch.equal(batches[3].frames, parts()[3].frames)
    assert set(batches[3].keys).isdisjoint(batches[4].keys)
    assert not torch.equal(batches[3].frames, parts(seed=1)[3].frames)


def test_truth_is_exact_and_siblings_are_false_of_one_another():
    config = WorldConfig(grouped=1.0, group_size=4)
    scenes, groups = compose(config, 0, 2, 16)
    assert len(scenes) == len(groups) == 16
    same = groups[:, None] == groups[None]
    claims = [facts(scene) for scene in scenes]
    for i, j in np.argwhere(same & ~np.eye(16, dtype=bool)):
        assert not (is_true(claims[j], scenes[i]) and is_true(claims[i], scenes[j]))
    sizes = np.bincount(groups)
    assert sizes.max() == 4 and sizes.sum() == 16 and (sizes >= 2).sum() >= 3


def test_positives_say_which_caption_is_true_of_which_video(parts):
    batch = parts()[1]
    scenes, _ = compose(WorldConfig(grouped=0.5, group_size=4), 0, 1, 8)
    expected = [[is_true(facts(text), video) for text in scenes] for video in scenes]
    assert batch.positives.tolist() == expected and all(batch.positives.diagonal())


def test_groups_begin_with_the_reversed_twin_and_follow_the_curve():
    config = WorldConfig(grouped=((0.0, 0.0), (10.0, 1.0)), group_size=2)
    for step, num_groups in ((0, 0), (5, 4), (10, 8)):
        scenes, groups = compose(config, 0, step, 16)
        pairs = [number for number in set(groups.tolist()) if (groups == number).sum() == 2]
        first = [scenes[groups.tolist().index(number)] for number in pairs]
        assert len(pairs) <= num_groups and (step == 0 or len(pairs) >= num_groups - 2)
        for number, scene in zip(pairs, first, strict=True):
            if has_twin(scene):
                assert scenes[groups.tolist().index(number) + 1] == twin(scene)


def test_groups_hold_the_scene_with_another_cast_if_asked():
    config = WorldConfig(grouped=1.0, group_size=3, recasts=1.0)
    scenes, groups = compose(config, 0, 0, 30)
    recasts = 0
    for number in set(groups.tolist()):
        first, *others = [scene for scene, group in zip(scenes, groups, strict=True) if group == number]
        recasts += any(replace(other, things=first.things) == first != other for other in others)
    assert recasts >= 8


def test_frames_are_those_of_the_evaluation_path(parts, tiny):
    config = tiny()
    model = make_model(config, make_tokenizer(config), torch.device("cpu"))
    scene = sample_scene("train", 0, 3)
    expected = preprocess(render(scene, sample_frames(8)), model.preprocessing)
    actual = to_input(render_clip(scene, model.preprocessing), model.preprocessing, torch.device("cpu"))
    assert torch.allclose(actual, expected, atol=1e-6)


def test_captions_are_known_words_only(parts):
    batch = parts()[0]
    tokenizer = parts()._tokenizer
    from vlm.text import Tokenizer

    unknown = Tokenizer.from_json(tokenizer).unknown_id
    assert not (batch.input_ids == unknown).any()


def test_captions_and_twins_of_shards_are_known_across_processes():
    first, second = sample_scene("train", 0, 0), sample_scene("train", 0, 1)
    back = twin(first)
    clips = [
        _Facts(scene.clip_id, caption(scene), (caption(scene),), scene.to_json(), other)
        for scene, other in ((first, back.clip_id), (second, None), (back, first.clip_id))
    ]
    known, twins = relations(clips)
    scenes = (first, second, back)
    assert known.tolist() == [[is_true(facts(text), video) for text in scenes] for video in scenes]
    assert twins.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    plain = [_Facts("a", "x", ("x", "y"), None, None), _Facts("b", "y", ("y",), None, None)]
    known, twins = relations(plain)
    assert known.tolist() == [[True, True], [False, True]] and not twins.any()


def test_true_pairs_and_twins_of_many_clips_against_a_slow_loop():
    rng = np.random.default_rng(0)
    clips = [
        _Facts(
            key=f"k{rng.integers(40)}",
            caption=f"t{rng.integers(20)}",
            captions=tuple(f"t{number}" for number in rng.integers(20, size=2)),
            scene=None,
            twin_key=None if rng.random() < 0.3 else f"k{rng.integers(50)}",
        )
        for _ in range(60)
    ]
    known, twins = relations(clips)
    assert known.tolist() == [
        [one.key == other.key or other.caption in one.captions for other in clips] for one in clips
    ]
    assert twins.tolist() == [[one.key == other.twin_key for other in clips] for one in clips]


def test_a_run_from_shards_resumes_at_its_place(tiny, make_shards):
    scenes, folder = [sample_scene("train", 0, index) for index in range(12)], make_shards(12)
    shards = f"data.shards={{corpora: {{digits: {{folders: [{folder}]}}}}, random_frames: false}}"
    config = tiny("data.source=shards", shards, "train.batch_size=4")
    model = make_model(config, make_tokenizer(config), torch.device("cpu"))
    with open_source(config, model, 0) as batches:
        whole = [next(batches) for _ in range(4)]
    with open_source(config, model, 2) as batches:
        rest = [next(batches) for _ in range(2)]
    for one, other in zip(whole[2:], rest, strict=True):
        assert one.keys == other.keys and torch.equal(one.video, other.video)
    assert sorted(key for batch in whole[:3] for key in batch.keys) == sorted(
        f"digits/0/{scene.clip_id}" for scene in scenes
    )
    assert whole[0].positives.shape == (4, 4) and whole[0].positives.diagonal().all()
    encoder = EncoderModel(EncoderConfig(vision=config.model.vision))
    with open_source(config, encoder, 0) as batches:
        silent = next(batches)
    assert torch.equal(silent.video, whole[0].video) and silent.text.input_ids.shape == (4, 0)


def test_shuffled_clips_hold_the_same_frames_in_another_order(parts, tiny):
    plain = parts()[3]
    config = tiny("data.world.shuffle_frames=true")
    model = make_model(config, make_tokenizer(config), torch.device("cpu"))
    shuffled = WorldBatches(
        config.data.world, seed=0, batch_size=8, rank=0, world_size=1, max_words=64,
        preprocessing=model.preprocessing, tokenizer=model.tokenizer.to_json(),
    )[3]  # fmt: skip
    assert torch.equal(shuffled.input_ids, plain.input_ids)
    moved = 0
    for before, after in zip(plain.frames, shuffled.frames, strict=True):
        assert sorted(frame.sum().item() for frame in before) == sorted(frame.sum().item() for frame in after)
        moved += not torch.equal(before, after)
    assert moved >= 7  # of eight clips; one may draw its own order


@pytest.mark.parametrize("wrong", [{"max_bad_fraction": 1.5}, {"max_bad_fraction": -0.1}, {"cache_gb": 0.0}])
def test_impossible_settings_of_shards(wrong):
    from vlm.training.sources.config import ShardsConfig

    with pytest.raises(ValueError, match="max_bad_fraction must be in"):
        ShardsConfig(**wrong)
