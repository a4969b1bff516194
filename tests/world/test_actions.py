"""What a clip is sorted by, against the events themselves and the reversed twin."""

import pytest

from vlm.world import ACTIONS, action, sample_scene, twin
from vlm.world.scene import OPPOSITE

SCENES = [sample_scene("val", 3, index) for index in range(300)]
SINGLE = [scene for scene in SCENES if len(scene.events) == 1]


def test_only_clips_of_one_event_have_a_class():
    for scene in SCENES:
        assert (action(scene, "action") is not None) == (len(scene.events) == 1)
    assert len({action(scene, "action") for scene in SINGLE}) > 9
    for scene in SINGLE:
        (event,) = scene.timeline
        name = action(scene, "action")
        assert name in ACTIONS["action"] and name.split()[0] == event.kind
        where = action(scene, "direction")
        assert where == (event.direction if event.kind in ("move", "zigzag") else None)


def test_the_twin_goes_the_other_way():
    turned = 0
    for scene in SINGLE:
        where, back = action(scene, "direction"), action(twin(scene), "direction")
        assert (where is None) == (back is None)
        if where is not None:
            assert back == OPPOSITE[where]
            turned += 1
    assert turned > 20


def test_a_clip_of_one_thing_is_sorted_by_what_it_is():
    alone = [scene for scene in SCENES if len(scene.things) == 1]
    assert len(alone) > 20 and {action(scene, "digit") for scene in alone} == set(ACTIONS["digit"])
    for scene in SCENES:
        expected = str(scene.things[0].digit) if len(scene.things) == 1 else None
        assert action(scene, "digit") == expected == action(twin(scene), "digit")


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="choice must be one of direction, action, digit, got 'colour'"):
        action(SCENES[0], "colour")
