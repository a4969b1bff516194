"""Fewer different frames: the rule by hand, nothing lost at the full count, everything at one."""

from __future__ import annotations

import pytest
import torch

from vlm.errors import InvalidInput
from vlm.evaluation.encoders.shards import Shard, encode_shard
from vlm.evaluation.features import few_frames
from vlm.evaluation.runner import RunOptions, evaluate_model


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, [0, 0, 2, 2, 4, 4, 6, 6]),
        (3, [0, 0, 3, 3, 3, 6, 6, 6]),  # spans of 2, 3 and 3 frames: 0-1, 2-4, 5-7
        (2, [1, 1, 1, 1, 5, 5, 5, 5]),
        (1, [3] * 8),
    ],
)
def test_the_rule(frames, expected):
    clip = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 2)
    assert few_frames(frames)(clip, 0)[:, 0, 0, 0].tolist() == expected


def test_more_frames_than_there_are():
    with pytest.raises(ValueError, match="at most 8 frames"):
        few_frames(9)(torch.zeros(8, 3, 2, 2), 0)
    with pytest.raises(ValueError, match="at least 1"):
        few_frames(0)


def _run(toy, data, protocol, load, curve, **named):
    options = RunOptions(frames_curve=curve, test_time_controls=False, **named)
    return evaluate_model(toy("order"), data, protocol, load, options=options)


def test_the_full_count_is_the_result_itself(toy, data, protocol, load):
    plain = _run(toy, data, protocol, load, ())
    card = _run(toy, data, protocol, load, (1, 4, 8))
    assert "frames_curve" not in plain
    assert card["results"] == plain["results"]
    assert card["per_query"] == plain["per_query"]
    points = {point["frames"]: point for point in card["frames_curve"]["points"]}
    assert list(points) == [1, 4, 8]
    for direction, kinds in points[8]["results"].items():
        assert kinds == {"itc": card["results"][direction]["itc"]}
    assert points[8]["twins"] == card["twins"]["itc"]
    # a model that knows clips by all their frames knows none with fewer
    for frames in (1, 4):
        found = points[frames]["results"]["query_to_item"]["itc"]["recall@5"]["value"]
        assert found == pytest.approx(card["chance"]["query_to_item"]["recall@5"]["value"])
    assert card["controls"] == {}


def test_each_number_sees_its_own_frames(toy, data, protocol, load):
    """A model that knows clips by four of their frames is perfect with four, and blind with eight."""
    model = toy("order")
    seen = few_frames(4)
    model.tables["order"] = [
        model._key(seen(load(path, model.preprocessing), 0), "order") for path in data.paths
    ]
    options = RunOptions(frames_curve=(2, 4, 8))
    card = evaluate_model(model, data, protocol, load, options=options)
    recall = [
        point["results"]["query_to_item"]["itc"]["recall@1"]["value"]
        for point in card["frames_curve"]["points"]
    ]
    assert recall[1] == 1.0
    assert max(recall[0], recall[2]) < 0.2
    assert set(card["controls"]) == {"shuffled-frames", "first-frame"}


@pytest.mark.parametrize("curve", [(0,), (4, 9)])
def test_counts_that_the_model_does_not_have(toy, data, protocol, load, curve):
    with pytest.raises(InvalidInput, match=r"--frames-curve: expected numbers from 1 to 8.*got [09]$"):
        _run(toy, data, protocol, load, curve)


def test_parts_encode_what_the_curve_needs(toy, on_disk, protocol, load, tmp_path):
    """After the parts nothing is left to encode, and the curve from the cache is that of a run without."""
    options = RunOptions(frames_curve=(2, 8), cache=tmp_path / "cache")
    model = toy("order")
    assert sum(encode_shard(model, on_disk, protocol, load, Shard(i, 2), options) for i in range(2)) == 20
    card = evaluate_model(model, on_disk, protocol, load, options=options)
    assert card["cost"]["videos_encoded"] == 0
    expected = evaluate_model(model, on_disk, protocol, load, options=RunOptions(frames_curve=(2, 8)))
    assert card["frames_curve"] == expected["frames_curve"]
