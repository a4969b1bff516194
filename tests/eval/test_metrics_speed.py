"""`vlm eval metrics_speed` runs, its two ways of ranking agree, and the committed figures keep the limits."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from vlm.assets import asset
from vlm.cli import main


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("metrics_speed", asset("eval/metrics_speed.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_run(tmp_path, capsys):
    out = tmp_path / "speed.json"
    assert main(["eval", "metrics_speed", "--quick", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["format"] == "vlm-metrics-speed/1"
    assert (figures["card"]["side"], figures["ranks"]["side"]) == (60, 200)
    assert figures["large"]["file_bytes"] == 4 * 400 * 20
    assert 2**24 < figures["large"]["peak_resident_bytes"] < 2**31
    assert "peak memory of that card" in capsys.readouterr().out


def test_the_rival_ranks_as_it_should(program):
    scores = np.random.default_rng(0).standard_normal((30, 30))
    expected = [int((row > row[place]).sum()) + 1 for place, row in enumerate(scores)]
    assert program._argsort_ranks(scores).tolist() == expected


def test_a_disagreement_is_no_figure(program, monkeypatch):
    monkeypatch.setattr(program, "_argsort_ranks", lambda scores: np.ones(len(scores), int))
    with pytest.raises(AssertionError, match="counting and sorting disagree"):
        program._time_ranks(50)


def test_committed_figures_keep_the_limits(program):
    figures = json.loads(asset("eval/results/metrics-speed-cpu.json").read_text())
    sizes = program.Sizes()
    assert (figures["card"]["side"], figures["card"]["resamples"]) == (sizes.card, sizes.resamples)
    assert (figures["ranks"]["side"], figures["large"]["queries"]) == (sizes.ranks, sizes.queries)
    assert figures["card"]["wall_s"] < figures["limits"]["card_s"] == 2.0
    assert figures["ranks"]["wall_s"] < figures["limits"]["ranks_s"] == 20.0
    assert figures["large"]["peak_resident_bytes"] < figures["limits"]["memory_bytes"] == 4 * 2**30
    assert figures["machine"]["commit"] and figures["machine"]["device"]
