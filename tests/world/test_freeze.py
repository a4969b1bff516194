"""World v1 is frozen: another generator needs another protocol name."""

import pytest
import yaml

from vlm.assets import asset
from vlm.world import sampling
from vlm.world.clips import manifest_hash

MESSAGE = "the world is not the one that was frozen: give the new one a new version and protocol name"


@pytest.fixture(scope="module")
def frozen():
    return yaml.safe_load(asset("eval/protocols/world.yaml").read_text())["freeze"]


def test_the_world_is_the_frozen_one(world_now, frozen):
    assert set(world_now) == set(frozen)
    for part, value in world_now.items():
        assert value == frozen[part], f"{part}: {MESSAGE}"


def test_a_changed_scene_changes_the_hash(monkeypatch, frozen):
    monkeypatch.setitem(sampling.SPEED_RANGES, "slowly", (0.8, 1.06))
    assert manifest_hash(sampling.gallery("val", 0, 200)) != frozen["manifests"]["val"]
