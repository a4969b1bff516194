"""The benchmark program runs, leaves the environment alone, and writes consistent figures."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from vlm.ops import cpu_library
from vlm.ops.backends import VARIABLE

PROGRAMS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


def program(name):
    """The module of a program's file, which is no part of any package."""
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the programs of this folder find each other by plain name
    spec.loader.exec_module(module)
    return module


cases = program("cases")
run = program("run")
CASES, Case, job = cases.CASES, cases.Case, cases.job


def test_figures_are_consistent(tmp_path, monkeypatch, capsys):
    if not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    tiny = tuple(
        Case(name=c.name, kind=c.kind, batch=1, length=9, channels=8, states=4, rank=2) for c in CASES
    )
    monkeypatch.setattr(run, "CASES", tiny)
    monkeypatch.delenv(VARIABLE, raising=False)
    out = tmp_path / "results.json"
    assert (
        run.main(["--seconds", "0.001", "--case", tiny[0].name, "--case", tiny[2].name, "--out", str(out)])
        == 0
    )
    results = json.loads(out.read_text())
    assert set(results["cases"]) == {tiny[0].name, tiny[2].name}
    assert results["machine"]["processor"] and results["multiply_adds_per_s"] > 0
    for case in (tiny[0], tiny[2]):
        row = results["cases"][case.name]
        assert row["updates"] == case.updates
        for mode in ("forward", "forward_backward"):
            times = row[mode]["times"]
            assert row[mode]["chunked_over_cpu"] == times["chunked"]["cpu_ms"] / times["cpu"]["cpu_ms"]
    assert case.name in capsys.readouterr().out
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("kind", ["scan", "block"])
def test_every_leaf_takes_part(kind):
    run_once, leaves = job(
        Case(name="x", kind=kind, batch=1, length=5, channels=6, states=3, rank=2), gradient=True
    )
    out = run_once()
    assert out.shape == (1, 5, 6)
    for gradient in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert gradient.abs().max() > 0


def test_committed_results_are_of_these_cases(root):
    files = list((root / "kernels" / "benchmarks" / "results").glob("cpu-*.json"))
    assert files
    for file in files:
        results = json.loads(file.read_text())
        assert set(results["cases"]) == {c.name for c in CASES}
        assert {c.name: c.updates for c in CASES} == {k: v["updates"] for k, v in results["cases"].items()}


@pytest.mark.slow
def test_a_transformers_model_is_timed_only_if_its_logits_agree(monkeypatch, capsys, tmp_path):
    try:
        import torchvision  # noqa: F401
    except Exception:  # built for another torch; transformers would import it and fail, but needs it not
        monkeypatch.setitem(sys.modules, "torchvision", None)
    pytest.importorskip("transformers", minversion="5")
    timed = program("transformers_mamba")
    words = ["--length", "9", "--width", "8", "--layers", "1", "--seconds", "0"]
    out = tmp_path / "mamba.json"
    assert timed.main([*words, "--out", str(out)]) == 0
    assert "forward_backward: own scan" in capsys.readouterr().out
    row = json.loads(out.read_text())["forward"]
    assert row["pairs"] == 3 and 0 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    wrong = lambda u, *_args, **_options: u  # noqa: E731
    monkeypatch.setattr(timed, "patch", lambda: monkeypatch.setattr(module, "mamba_selective_scan", wrong))
    assert timed.main(words) == 1
    assert "logits differ" in capsys.readouterr().err
