"""The benchmark program runs, leaves the environment alone, and writes consistent figures."""

from __future__ import annotations

import dataclasses
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
rivals = program("rivals")
run = program("run")
CASES, Case, RIVALS = cases.CASES, cases.Case, rivals.RIVALS
# every one that needs no compiler of PyTorch's
QUICK = [name for name in RIVALS if name != "compiled"]


def tiny(kind="scan", name="x"):
    return Case(name=name, kind=kind, batch=2, length=9, channels=8, states=4, rank=2)


@pytest.fixture
def small_cases(monkeypatch):
    if not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    monkeypatch.setattr(run, "CASES", tuple(tiny(c.kind, c.name) for c in CASES))
    monkeypatch.delenv(VARIABLE, raising=False)
    return run.CASES


def test_figures_are_consistent(small_cases, tmp_path, capsys):
    out = tmp_path / "results.json"
    scan, _, block = small_cases
    words = ["--seconds", "0.001", "--case", scan.name, "--case", block.name, "--out", str(out)]
    assert run.main([*words, "--rivals", *QUICK]) == 0
    results = json.loads(out.read_text())
    assert set(results["cases"]) == {scan.name, block.name}
    assert results["machine"]["processor"] and results["bound_updates_per_s"] > 0 and results["commit"]
    for case in (scan, block):
        row = results["cases"][case.name]
        assert row["updates"] == case.updates and row["sizes"]["length"] == case.length
        for mode in run.MODES:
            assert "cpu" in row[mode] and "chunked" in row[mode]
            for name, figures in row[mode].items():
                assert "cannot_run" not in figures, figures
                assert 0 < figures["least_ms"] <= figures["median_ms"] and figures["turns"] > 0
                assert figures["error"] < 5e-5
                assert ("ratio" in figures) == (name != "cpu")
    assert set(results["cases"][scan.name]["forward"]) == set(QUICK)
    assert case.name in capsys.readouterr().out
    assert VARIABLE not in os.environ


def test_any_can_be_timed_against_any(small_cases, tmp_path):
    out = tmp_path / "results.json"
    words = ["--seconds", "0", "--case", small_cases[0].name, "--mode", "forward", "--out", str(out)]
    assert run.main([*words, "--backend", "sequential", "--rivals", "scalar"]) == 0
    row = json.loads(out.read_text())["cases"][small_cases[0].name]["forward"]
    assert list(row) == ["sequential", "scalar"] and "ratio" in row["scalar"]


def test_a_wrong_backend_has_no_ratio(small_cases, monkeypatch, capsys):
    def off(case, gradient):
        task = RIVALS["chunked"].prepare(case, gradient)
        forward = task.forward
        return dataclasses.replace(task, forward=lambda: forward() * (1 + 2e-5))

    monkeypatch.setitem(RIVALS, "cpu", dataclasses.replace(RIVALS["cpu"], prepare=off))
    assert run.main(["--seconds", "0", "--case", small_cases[0].name, "--rivals", "chunked"]) == 1
    said = capsys.readouterr()
    assert "the output is off by 2.0e-05" in said.err and "x" not in said.out


def test_a_rival_whose_gradient_is_wrong_is_refused():
    task = RIVALS["sequential"].prepare(tiny(), True)
    expected = cases.truth(tiny(), gradient=True)
    assert run.check("sequential", task, expected) < 1e-6
    expected[3] *= 1.001
    with pytest.raises(run.Wrong, match="a gradient is off by 1"):
        run.check("sequential", task, expected)


def test_a_rival_that_cannot_run_says_why(small_cases, monkeypatch, tmp_path, capsys):
    def refuse(case, gradient):
        raise RuntimeError("not on this machine")

    monkeypatch.setitem(RIVALS, "associative", rivals.Rival(refuse, "refuses"))
    out = tmp_path / "results.json"
    words = ["--seconds", "0", "--case", small_cases[0].name, "--mode", "forward", "--out", str(out)]
    assert run.main([*words, "--rivals", "associative"]) == 0
    row = json.loads(out.read_text())["cases"][small_cases[0].name]["forward"]
    assert row["associative"] == {"cannot_run": "RuntimeError: not on this machine"}
    assert "not on this machine" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in RIVALS if RIVALS[name].has_gradient])
@pytest.mark.parametrize("kind", ["scan", "block"])
def test_every_leaf_takes_part(name, kind):
    if kind not in RIVALS[name].kinds:
        pytest.skip("not its kind")
    if RIVALS[name].prepare(tiny(), True).backend == "cpu" and not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    task = RIVALS[name].prepare(tiny(kind), True)
    out, *gradients = task.in_order(task.once(gradient=True))
    assert out.shape == (2, 9, 8)
    assert [g.shape for g in gradients] == [x.shape for x in cases.draw(tiny(kind))]
    assert all(g.abs().max() > 0 for g in gradients)


def test_truth_is_autograd_of_the_plain_loop():
    expected = cases.truth(tiny(), gradient=True)
    leaves = [x.requires_grad_() for x in cases.draw(tiny(), torch.float64)]
    u, z, delta, rows, A, D, bias = leaves
    dt = torch.nn.functional.softplus(delta + bias)
    h, y = torch.zeros(2, 8, 4, dtype=torch.float64), []
    for t in range(9):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * rows[:, t, None, :4]
        y.append((h * rows[:, t, None, 4:]).sum(-1))
    out = (torch.stack(y, 1) + u * D) * torch.nn.functional.silu(z)
    found = [out.detach(), *torch.autograd.grad(out, leaves, cases.weights(tiny(), torch.float64))]
    assert cases.relative_error(found, expected) < 1e-13


def test_committed_results_are_of_these_cases(root):
    files = list((root / "kernels" / "benchmarks" / "results").glob("cpu-*.json"))
    assert files
    for file in files:
        results = json.loads(file.read_text())
        assert set(results["cases"]) == {c.name for c in CASES}
        assert {c.name: c.updates for c in CASES} == {k: v["updates"] for k, v in results["cases"].items()}


def test_the_encoder_is_timed_only_if_its_features_agree(monkeypatch, capsys, tmp_path):
    if not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    monkeypatch.delenv(VARIABLE, raising=False)
    timed = program("encoder")
    out = tmp_path / "encoder.json"
    words = [
        "--width",
        "16",
        "--depth",
        "2",
        "--frames",
        "2",
        "--side",
        "32",
        "--threads",
        "1",
        "--turns",
        "2",
    ]
    assert timed.main([*words, "--out", str(out)]) == 0
    row = json.loads(out.read_text())["threads"]["1"]
    assert 0 < row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
    assert abs(sum(row["shares"].values()) - 1) < 1e-6 and all(row["shares"].values())
    assert VARIABLE not in os.environ and "chunked" in capsys.readouterr().out
    encode = timed.encode
    off = lambda model, video, backend: encode(model, video, backend) * (1 + 2e-4 * (backend == "cpu"))  # noqa: E731
    monkeypatch.setattr(timed, "encode", off)
    assert timed.main(words) == 1
    said = capsys.readouterr()
    assert "the features differ by 2.0e-04" in said.err and not said.out


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
