"""Twins and minimal pairs: exactly one thing differs, and the captions know it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vlm.world import caption, facts, has_twin, is_true, recast, sample_scene, twin, variants
from vlm.world.captions import Template
from vlm.world.facts import content
from vlm.world.splits import belongs, is_sound

PLAIN = Template(0, 0, 0, 0, 0)
SYMMETRIC = {"bounce", "blink", "swap"}


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene("train", 11, index) for index in range(500)]


def test_a_twin_is_an_involution_of_the_same_split_and_detail(scenes):
    for scene in scenes:
        assert twin(twin(scene)) == scene
        assert belongs(twin(scene), scene.split)
        if has_twin(scene):
            assert not is_true(facts(scene), twin(scene)) and not is_true(facts(twin(scene)), scene)
            assert has_twin(twin(scene))
            assert len(facts(scene)) == len(facts(twin(scene)))


def test_time_symmetric_scenes_have_no_twin(scenes):
    alone = [s for s in scenes if len(s.events) == 1]
    assert any(s.events[0].kind in SYMMETRIC for s in alone)
    for scene in alone:
        kind = scene.events[0].kind
        unnamed = kind == "circle" and "clockwise" not in caption(scene)
        assert has_twin(scene) == (kind not in SYMMETRIC and not unnamed), caption(scene)


def test_there_and_back_again_has_no_twin():
    """Moves left, then right: reversed it moves left, then right."""
    base = next(
        s
        for s in (sample_scene("train", 12, i) for i in range(500))
        if len(s.things) == 1 and len(s.events) == 2 and all(e.kind == "move" for e in s.events)
    )
    one, other = base.events
    both = replace(
        base,
        events=(
            replace(one, direction="left", dx=-20.0, dy=0.0, speed="slowly"),
            replace(other, direction="right", dx=20.0, dy=0.0, speed="slowly"),
        ),
    )
    assert not has_twin(both)
    assert has_twin(base) or base.events[0].direction != "left"


def test_variants_are_valid_false_of_each_other_and_change_one_thing(scenes):
    rng = np.random.default_rng(3)
    seen = Counter()
    for scene in scenes:
        before = caption(scene, PLAIN).split()
        for kind, other in variants(scene, rng).items():
            seen[kind] += 1
            assert is_sound(other) and belongs(other, scene.split)
            assert not is_true(facts(scene), other) and not is_true(facts(other), scene), kind
            assert other.background == scene.background and other.noise_seed == scene.noise_seed
            check_change(kind, scene, other, before, caption(other, PLAIN).split())
    kinds = "digit binding actor direction speed count concurrency left-of stopping order"
    assert set(seen) == set(kinds.split())
    assert min(seen.values()) > 8, seen


def check_change(kind, scene, other, before, after):
    swapped = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
    same_things = Counter((t.colour, t.digit) for t in scene.things) == Counter(
        (t.colour, t.digit) for t in other.things
    )
    if kind == "digit":
        assert not same_things and len({pair for pair in swapped}) == 1 and len(before) == len(after)
        assert all(a.isdigit() and b.isdigit() for a, b in swapped)
    elif kind in ("binding", "actor"):
        names = {str(part) for t in scene.things for part in (t.colour, t.digit)} | {"the", "it"}
        assert [w for w in before if w not in names] == [w for w in after if w not in names]
        assert {w for w in before if w in names} == {w for w in after if w in names} or "it" in before + after
        assert same_things == (kind == "actor")
        assert scene.events == other.events
    elif kind in ("direction", "speed", "count"):
        gone, come = Counter(before) - Counter(after), Counter(after) - Counter(before)
        assert same_things and gone.total() == come.total() == 1
        changed = [(a, b) for a, b in zip(scene.events, other.events, strict=True) if a != b]
        assert len(changed) == 1
    elif kind == "concurrency":
        words = Counter(before)
        words.subtract(after)
        assert {word for word, n in words.items() if n} == {"then", "while"} and same_things
    elif kind == "left-of":
        assert scene.events == other.events and same_things
        assert content(scene) == content(other)
    elif kind == "stopping":
        words = {word for word in (set(before) ^ set(after))}
        assert words & {"stops", "waits", "nonstop"} and words <= {"and", "stops", "waits", "nonstop"}
    else:
        assert kind == "order" and same_things and before != after
        what = [
            Counter((e.kind, e.direction, e.speed, e.count, e.subject) for e in each.events)
            for each in (scene, other)
        ]
        assert what[0] == what[1]


def test_variants_are_drawn_from_the_rng_alone(scenes):
    for scene in scenes[:20]:
        one, other = (variants(scene, np.random.default_rng(5)) for _ in range(2))
        assert one == other


def test_a_recast_is_the_same_motion_done_by_others(scenes):
    rng = np.random.default_rng(0)
    changed = Counter()
    for scene in scenes:
        other = recast(scene, rng)
        if other is None:
            continue
        assert is_sound(other) and belongs(other, scene.split)
        assert replace(other, things=scene.things) == scene
        assert not is_true(facts(scene), other) and not is_true(facts(other), scene)
        names = [{(thing.colour, thing.digit) for thing in each.things} for each in (scene, other)]
        assert not names[0] & names[1]
        for before, after in zip(scene.things, other.things, strict=True):
            looks = before.colour != after.colour, before.digit != after.digit
            assert (before.image == after.image) == (not looks[1])
            assert replace(after, colour=before.colour, digit=before.digit, image=before.image) == before
            changed[looks] += 1
    assert set(changed) == {(True, True), (True, False), (False, True)}
    assert sum(changed.values()) > len(scenes) / 2, changed
