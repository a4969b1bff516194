"""A run on reels so small that a step takes milliseconds."""

from __future__ import annotations

import copy

import pytest
import yaml


@pytest.fixture
def small(tmp_path, settings):
    """Return a function that gives the tiny ``TrainingConfig`` on reels with ``--set`` overrides."""
    from vlm.config import load_config
    from vlm.training.config import TrainingConfig

    values = copy.deepcopy(settings)
    values["model"]["vision"] |= {"image_size": 32, "patch_size": 16}
    values["data"] = {"source": "reels", "workers": 0, "reels": {"num_scenes": 3.0, "pairs": 2}}
    values["losses"] = {}
    values["train"] |= {"max_steps": 4, "batch_size": 4}
    values["evaluation"] = {"every": 2, "clips": 2, "best": "order"}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")

    def make(*overrides: str) -> TrainingConfig:
        return load_config(TrainingConfig, path, overrides)

    make.path = path
    return make
