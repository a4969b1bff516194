"""Where training on shards spends its time: what is slowed on purpose shows, and the figures fit together."""

from __future__ import annotations

import json
import time

import pytest

from vlm.cli import main
from vlm.data import ShardSource
from vlm.errors import ConfigError
from vlm.training.objective import Objective
from vlm.training.reports.stages import STAGES, measure_stages


@pytest.fixture
def on_shards(make_shards, tiny):
    return tiny(
        "data.source=shards",
        f"data.shards={{corpora: {{digits: {{folders: [{make_shards(8)}]}}}}, random_frames: false}}",
        "train.batch_size=4",
        "evaluation.every=0",
    )


def slowed(function, seconds):
    def slow(*arguments, **named):
        time.sleep(seconds)
        return function(*arguments, **named)

    return slow


def test_a_slow_decoder_shows_as_waiting(on_shards, monkeypatch):
    monkeypatch.setattr(ShardSource, "load", slowed(ShardSource.load, 0.05))
    found = measure_stages(on_shards, [0], 2)
    assert found["sample_ms"]["decode"] > 50 > found["sample_ms"]["transform"]
    (row,) = found["workers"]
    assert row["decode_samples_per_s"] < 1 / 0.05
    assert row["update_ms"]["wait"] > 4 * 50


def test_a_slow_model_shows_as_forward_and_its_waiting_goes_with_workers(on_shards, monkeypatch):
    monkeypatch.setattr(ShardSource, "load", slowed(ShardSource.load, 0.02))
    monkeypatch.setattr(Objective, "forward", slowed(Objective.forward, 0.2))
    found = measure_stages(on_shards, [0, 4], 3)
    assert found["update_ms"]["forward"] > 200 > found["update_ms"]["optimizer"]
    assert found["compute_samples_per_s"] < 4 / 0.2
    alone, fed = found["workers"]
    assert alone["update_ms"]["wait"] > 4 * 20
    assert fed["data_wait"] < alone["data_wait"] / 2


def test_what_cannot_be_measured_is_refused(tiny):
    with pytest.raises(ConfigError, match="expected a run on shards with the plain engine"):
        measure_stages(tiny(), [0], 1)


def test_as_a_user_runs_it(on_shards, tiny, tmp_path, capsys):
    folder = on_shards.data.shards.corpora["digits"].folders[0]
    words = ["eval", "throughput", "--training", str(tiny.path), "--updates", "2", "--workers", "0", "1"]
    sets = [
        "data.source=shards",
        f"data.shards.corpora.digits.folders=[{folder}]",
        "train.batch_size=4",
        "evaluation.every=0",
    ]
    words += [word for item in sets for word in ("--set", item)]
    out = tmp_path / "speed.json"
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "a sample, in ms of one thread: decode" in printed and len(printed.splitlines()) == 6
    results = json.loads(out.read_text())
    assert results["format"] == "vlm-training-throughput/1"
    assert results["machine"].keys() >= {"device", "cores", "commit", "load_average"}
    assert results["samples"] == {"digits": 8}
    assert [row["workers"] for row in results["workers"]] == [0, 1]
    for row in results["workers"]:
        assert tuple(row["update_ms"]) == STAGES and min(row["update_ms"].values()) >= 0
        total_s = sum(row["update_ms"].values()) / 1e3
        assert row["samples_per_s"] == pytest.approx(4 / total_s)
        assert row["data_wait"] == pytest.approx(row["update_ms"]["wait"] / 1e3 / total_s)
        limit = min(row["decode_samples_per_s"], results["compute_samples_per_s"])
        assert row["of_slower_limit"] == pytest.approx(row["samples_per_s"] / limit)
    assert not list(tmp_path.glob("*.part")) and str(folder) not in out.read_text()
