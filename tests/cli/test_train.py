"""``vlm train`` as a user types it: wrong keys, dry runs, the shipped configurations."""

import json
from pathlib import Path

import pytest
import yaml

from vlm.cli import main
from vlm.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "train").rglob("*.yaml"))
TINY = {
    "tokenizer": "world",
    "model": {
        "embedding_width": 8,
        "vision": {"width": 16, "depth": 1, "num_frames": 8, "image_size": 64, "patch_size": 32},
        "text": {
            "width": 16, "num_layers": 2, "fusion_layer": 1, "num_heads": 2, "intermediate_width": 16,
            "max_positions": 64, "vision_width": 16, "dropout": 0.0, "has_language_head": False,
        },
    },
    "data": {"workers": 0},
    "train": {"max_steps": 4, "batch_size": 4, "device": "cpu"},
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_begin_with_their_command(path):
    from vlm.training.config import TrainingConfig

    load_config(TrainingConfig, path)
    assert path.read_text().startswith(f"# vlm train {path.relative_to(ROOT)} ")


def test_a_dry_run_prints_the_cost_and_writes_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), "--dry-run"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["clips"] == 16 and cost["tokens_per_clip"] == 8 * 4 + 1
    assert cost["parameters"] == sum(cost["parameters_by_part"].values()) + 1  # and the temperature
    assert cost["hours"] > 0 and cost["updates"][0]["clips_per_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_mistakes_have_their_exit_codes(config, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", str(config), "--set", "train.max_step=5", "--out", run]) == 2
    assert "did you mean 'max_steps'" in capsys.readouterr().err
    assert main(["train", str(config), "--out", run, "--resume", run]) == 2
    assert main(["train", str(tmp_path / "none.yaml")]) == 4
    assert main(["train", str(config), "--resume", run]) == 4
    assert "no run to resume" in capsys.readouterr().err
    bad = tmp_path / "bad.yaml"
    bad.write_text("trian: {}\n")
    assert main(["train", str(bad)]) == 4
    assert "did you mean 'train'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
