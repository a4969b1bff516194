"""Scenes: pure functions of (split, seed, index), sound, and never shared between splits."""

import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from vlm.world import Scene, gallery, has_twin, sample_scene, templates
from vlm.world.captions import choose_template
from vlm.world.clips import manifest_hash
from vlm.world.digits import BLOCKS, load_digits
from vlm.world.scene import LAST, OPPOSITE, SPIN_DIGITS
from vlm.world.splits import (
    SPLITS,
    held_combinations,
    is_held_order,
    is_held_pair,
    is_sound,
    scene_key,
)


@pytest.fixture(scope="module")
def stream():
    """A stretch of every split, its seeds different."""
    return {
        split: [sample_scene(split, 100 + place, index) for index in range(900 if split == "train" else 300)]
        for place, split in enumerate(SPLITS)
    }


def test_another_process_draws_the_same_scenes_in_any_order():
    program = (
        "from vlm.world import sample_scene\n"
        "from vlm.world.clips import manifest_hash\n"
        "print(manifest_hash([sample_scene('test', 4, i) for i in (7, 3, 5)][::-1]))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == manifest_hash([sample_scene("test", 4, i) for i in (5, 3, 7)])


def test_seed_index_and_split_all_matter():
    keys = {sample_scene(s, seed, i).to_json() for s in SPLITS for seed in (0, 1) for i in (0, 1, 2)}
    assert len(keys) == len(SPLITS) * 6


@pytest.mark.parametrize(("split", "seed", "index"), [("tset", 0, 0), ("test", -1, 0), ("test", 0, -1)])
def test_a_wrong_address_is_an_error(split, seed, index):
    with pytest.raises(ValueError, match="expected a split of"):
        sample_scene(split, seed, index)


def test_json_round_trip_and_refusal(stream):
    for scene in stream["train"][:50]:
        assert Scene.from_json(scene.to_json()) == scene
    for text in ("{}", "[]", '{"things": 3}', stream["val"][0].to_json().replace('"noise"', '"noize"')):
        with pytest.raises(ValueError, match=r"Scene\.to_json"):
            Scene.from_json(text)


def test_every_scene_is_sound(stream):
    for split, scenes in stream.items():
        for scene in scenes:
            assert is_sound(scene) and 1 <= len(scene.things) <= 3 and 1 <= len(scene.events) <= 4
            assert all(0 <= e.start < e.end <= LAST for e in scene.timeline)
            labels = load_digits()[1]
            for thing in scene.things:
                assert labels[thing.image] == thing.digit
            for event in scene.events:
                if event.kind == "spin":
                    assert scene.things[event.subject].digit in SPIN_DIGITS
        assert {len(s.things) for s in scenes} == {1, 2, 3}
        assert {len(s.events) for s in scenes} == {1, 2, 3, 4}, split


def test_an_unsound_scene_is_recognised():
    scene = next(s for s in gallery("train", 1, 200) if any(e.kind == "spin" for e in s.events))
    turning = next(e.subject for e in scene.events if e.kind == "spin")
    things = list(scene.things)
    things[turning] = replace(things[turning], digit=6)
    assert not is_sound(replace(scene, things=tuple(things)))
    late = replace(scene.events[0], end=LAST + 1)
    assert not is_sound(replace(scene, events=(late, *scene.events[1:])))
    assert not is_sound(replace(scene, events=(*scene.events, scene.events[0])))


def test_nothing_of_one_split_is_in_another(stream):
    def images(split):
        return {thing.image for scene in stream[split] for thing in scene.things}

    def keys(split):
        return {scene_key(s) for s in stream[split]} | {scene_key(s.backwards()) for s in stream[split]}

    def wordings(split):
        return {choose_template(scene) for scene in stream[split]}

    for one, other in (
        ("train", "val"),
        ("train", "test"),
        ("train", "combo"),
        ("val", "test"),
        ("val", "combo"),
    ):
        assert not images(one) & images(other)
        assert not keys(one) & keys(other)
        assert not wordings(one) & wordings(other)
    assert len(images("train")) > 600 and wordings("train") == set(templates("train"))


def test_writers_are_whole_blocks():
    ranges = sorted(BLOCKS.values())
    assert ranges[0][0] == 0 and ranges[-1][1] == len(load_digits()[0]) == 1797
    assert all(one[1] == other[0] for one, other in zip(ranges, ranges[1:], strict=False))
    labels = load_digits()[1]
    for first, _ in ranges:  # every writer begins with the ten digits in order
        assert labels[first : first + 10].tolist() == list(range(10))


def test_combo_holds_out_combinations_and_train_knows_every_atom(stream):
    found = Counter(name for scene in stream["combo"] for name in held_combinations(scene))
    assert min(found[name] for name in ("digit-colour", "kind-direction", "event-order")) >= 100
    assert all(held_combinations(scene) for scene in stream["combo"])
    assert not any(held_combinations(scene) for split in ("train", "val", "test") for scene in stream[split])

    def atoms(split):
        found = defaultdict(set)
        for scene in stream[split]:
            found["digit"] |= {thing.digit for thing in scene.things}
            found["colour"] |= {thing.colour for thing in scene.things}
            found["kind"] |= {event.kind for event in scene.events}
            found["direction"] |= {event.direction for event in scene.events}
            order = scene.timeline
            found["before"] |= {(e.kind, e.direction) for e in order[:-1] if len(order) > 1} - {
                ("zigzag", "up"), ("zigzag", "down")
            }  # fmt: skip
        return found

    known = atoms("train")
    for name, values in atoms("combo").items():
        assert values <= known[name], name


def test_held_orders_do_not_depend_on_which_way_time_runs():
    events = [("move", way) for way in ("left", "right", "up", "down")]
    events += [("circle", "clockwise"), ("circle", "counterclockwise"), ("bounce", None), ("blink", None)]
    held = 0
    for one in events:
        for other in events:
            back = [(kind, OPPOSITE[way] if way else None) for kind, way in (other, one)]
            assert is_held_order(one, other) == is_held_order(*back)
            held += is_held_order(one, other)
    assert 0 < held < len(events) ** 2 / 3
    assert all(1 <= sum(is_held_pair(digit, c) for digit in range(10)) <= 2 for c in ("red", "blue", "pink"))


def test_the_gallery_alternates_clip_and_twin():
    scenes = list(gallery("test", 0, 40, twins=True))
    assert len(scenes) == 80
    for scene, twin in zip(scenes[::2], scenes[1::2], strict=True):
        assert twin == scene.backwards() and has_twin(scene) and has_twin(twin)
    assert len({scene.clip_id for scene in scenes}) == 80
    plain = list(gallery("test", 0, 40))
    assert [scene.index for scene in plain] == list(range(40))


def test_which_way_time_runs_is_a_fair_coin(stream):
    flips = np.array([scene.reversed for scenes in stream.values() for scene in scenes])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / len(flips) ** 0.5
