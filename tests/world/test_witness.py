"""Captions and tests must not share one mistake: a tracker that reads only decoded pixels confirms events."""

import av
import numpy as np
import pytest

from vlm.world import render, sample_scene
from vlm.world.clips import describe, encode


def decoded(scene, path):
    encode(render(scene), path)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def confirm(record, seen):
    """Every event of the record is among those seen, to the frame, and no other was seen."""
    colours = [item["colour"] for item in record["objects"]]
    rest = list(seen)
    for event in record["events"]:
        who = {colours[event["object"]]} | ({colours[event["partner"]]} if event["kind"] == "swap" else set())
        fitting = [
            each
            for each in rest
            if each["kind"] == event["kind"]
            and who == {each["colour"], each.get("partner", each["colour"])}
            and each.get("direction") == event["direction"]
            and (event["count"] is None or each["count"] == event["count"])
            and (event["speed"] is None or each["speed"] == event["speed"])
            and abs(each["start"] - event["start_frame"]) <= 1
            and abs(each["end"] - event["end_frame"]) <= 1
        ]
        assert len(fitting) == 1, (record["caption"], event, seen)
        rest.remove(fitting[0])
    assert not rest, (record["caption"], rest)


def watch(witness, tmp_path, seed, count):
    unsure = 0
    for index in range(count):
        scene = sample_scene(("test", "train", "combo")[index % 3], seed, index)
        told = witness(decoded(scene, tmp_path / "clip.mp4"))
        assert told.sure or len(scene.things) > 1 or scene.distractors
        if not told.sure:  # things hid one another: the tracker says so and does not guess
            unsure += 1
            continue
        record = describe(scene)
        assert set(told.things) == {item["colour"] for item in record["objects"]}
        confirm(record, told.events)
    return unsure


def test_the_tracker_confirms_kind_direction_order_and_times(witness, tmp_path):
    assert watch(witness, tmp_path, 41, 40) <= 10


@pytest.mark.slow
def test_the_tracker_confirms_five_hundred_clips(witness, tmp_path):
    assert watch(witness, tmp_path, 42, 500) <= 100


def test_the_tracker_notices_a_lie(witness, tmp_path):
    lies = 0
    for index in range(12):
        scene = sample_scene("test", 43, index)
        told = witness(decoded(scene, tmp_path / "clip.mp4"))
        if told.sure and any(event.direction for event in scene.events):
            with pytest.raises(AssertionError):
                confirm(describe(scene.backwards()), told.events)
            lies += 1
    assert lies > 3
