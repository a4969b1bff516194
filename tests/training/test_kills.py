"""Whenever training is killed, going on ends where an unbroken run ends, to the bit; nothing lies about."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm.training.checkpoint import verify

# each named point once; where it can be, when there is an earlier checkpoint to fall back to
POINTS = [
    "run-described", "model-before-swap", "model-in-swap", "model-swapped", "checkpoint-begun:2",
    "checkpoint-half-written:2", "checkpoint-written:2", "checkpoint-hashed:2", "checkpoint-before-rename:2",
    "checkpoint-after-rename:2", "checkpoint-marked:2", "checkpoint-in-rotation",
]  # fmt: skip
SETTINGS = {
    "train": {"max_steps": 6, "batch_size": 8, "device": "cpu", "timeout_s": 60},
    "evaluation": {"every": 3, "clips": 4},
    "checkpoint": {"every": 2, "keep": 2},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, root, settings):
    """What became of the runs of dying_runs.py."""
    folder = tmp_path_factory.mktemp("kills")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings | SETTINGS))
    command = [sys.executable, str(Path(__file__).with_name("dying_runs.py")), str(config), str(folder)]
    done = subprocess.run(
        [*command, *POINTS],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"folder": folder, "said": done.stderr}


def content(run: Path) -> dict[str, bytes]:
    """Every file that must not depend on when a run was killed."""
    files = [*(run / "checkpoints").rglob("*"), *(run / "best").iterdir(), *(run / "model").iterdir()]
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in files if path.is_file()}
    del found["model/card.json"]  # it says how long the run took
    return found | {name: (run / name).read_bytes() for name in ("metrics.jsonl", "config.yaml")}


def assert_equal_runs(run: str, unbroken: Path) -> None:
    found, expected = content(Path(run)), content(unbroken)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    odd = [path for path in Path(run).rglob("*") if path.suffix in (".tmp", ".partial", ".old")]
    assert odd == []
    for folder in (Path(run) / "checkpoints").glob("step-*"):
        verify(folder)


def test_eight_kills_at_random_times(killed):
    assert sum(len(row["killed"]) for row in killed["random"]) >= 8
    for row in killed["random"]:
        assert row["resumed"] == 0
        assert_equal_runs(row["run"], killed["folder"] / "unbroken")


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_each_named_point(killed, point):
    row = killed["points"][point]
    assert (row["killed"], row["resumed"]) == (-signal.SIGKILL, 0)
    assert_equal_runs(row["run"], killed["folder"] / "unbroken")


def test_a_full_disk_leaves_the_old_checkpoints_and_is_gone_on_from(killed):
    """The smallest limit stops it before its first step, the largest at a checkpoint's last byte."""
    for row in killed["full"]:
        assert row["code"] == 6, row
        whole = [name for name in row["left"] if name != "step-00000006.tmp"]  # the kill before left that
        assert whole == ["latest", "step-00000002", "step-00000004"]
        assert row["resumed"] == 0
        assert_equal_runs(row["run"], killed["folder"] / "unbroken")
    assert killed["said"].count("vlm: no space left while writing") == len(killed["full"])


def test_no_named_point_is_forgotten(root):
    files = [*(root / "vlm" / "training").rglob("*.py"), *(root / "vlm" / "models").rglob("*.py")]
    named = re.findall(r'crash_point\("([a-z-]+)"\)', "".join(path.read_text() for path in files))
    assert sorted(named) == sorted(point.partition(":")[0] for point in POINTS)


def test_one_of_two_ranks_is_killed(killed):
    row = killed["two"]
    assert row["killed"] == -signal.SIGKILL
    assert row["survivor"] not in (0, -signal.SIGKILL) and row["survived_s"] < 60
    assert row["resumed"] == [0, 0]
    assert_equal_runs(row["run"], killed["folder"] / "two-unbroken")


def test_a_kill_while_a_finished_model_is_replaced(killed):
    assert (killed["again"]["killed"], killed["again"]["resumed"]) == (-signal.SIGKILL, 0)
    assert_equal_runs(killed["again"]["run"], killed["folder"] / "unbroken")
