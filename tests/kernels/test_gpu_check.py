"""The GPU check as a program: what it writes, and that wrong numbers end it with 1 and without ratios."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from vlm.ops import cpu_calls, cpu_library
from vlm.ops.backends import VARIABLE

PROGRAM = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(program, tmp_path, monkeypatch):
    if not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(program, "LOADS", ((1, 2),))
    monkeypatch.setattr(program, "SIZES", {"Ti": (384, 16, "tiny")})

    def call(*sections, minutes=60):
        out = tmp_path / "check.json"
        words = ["--device", "cpu", "--small", "--seconds", "0", "--out", str(out)]
        words += ["--minutes", str(minutes)]
        for section in sections:
            words += ["--only", section]
        code = program.main(words)
        return code, json.loads(out.read_text())

    return call


def test_every_section_leaves_its_figures(run, capsys):
    code, results = run()
    assert code == 0
    assert list(results["sections"]) == ["correctness", "ceilings", "scan", "block", "encoder"]
    assert not any("error" in section for section in results["sections"].values())
    for name, second in (
        ("scan", "backward"),
        ("block", "forward_backward"),
        ("encoder", "forward_backward"),
    ):
        row = results["sections"][name]["Ti B1 T2"]
        assert list(row) == ["forward", second]
        assert all(row[job][backend]["median_ms"] > 0 for job in row for backend in ("cpu", "chunked"))
    assert results["sections"]["correctness"]["fp32"]["output"] < 1e-5
    assert " x\n" in capsys.readouterr().out
    assert VARIABLE not in os.environ


def test_wrong_numbers_end_it_with_one_and_no_ratio_is_printed(run, monkeypatch, capsys):
    right = cpu_calls.bi_scan_forward
    monkeypatch.setattr(
        cpu_calls,
        "bi_scan_forward",
        lambda scans, z, *, save: right([scans[0]._replace(D=scans[0].D * 1.1), *scans[1:]], z, save=save),
    )
    code, _ = run("correctness", "scan")
    assert code == 1
    said = capsys.readouterr().out
    assert "WRONG fp32 L1 " in said and "chunked" not in said.split("scan Ti")[1]


def test_wrong_gradients_are_found_too(run, monkeypatch, capsys):
    right = cpu_calls.bi_scan_backward

    def wrong(*arguments):
        gradients, joined, dz = right(*arguments)
        return gradients, [joined[0], joined[1] * 1.1], dz

    monkeypatch.setattr(cpu_calls, "bi_scan_backward", wrong)
    code, _ = run("correctness")
    said = capsys.readouterr().out
    assert code == 1 and "WRONG fp32 L1 " in said and "WRONG bf16 L33 e64 n16 b2 r16" in said


def test_what_there_is_no_time_for_is_left_out_comparisons_first(run, program):
    minutes = (program.OWN_SECONDS - 1) / 60
    code, results = run("scan", minutes=minutes)
    row = results["sections"]["scan"]["Ti B1 T2"]
    assert code == 0 and row["backward"]["cpu"]["median_ms"] > 0
    assert row["backward"]["chunked"] == {"error": "no time left"}
    code, results = run("scan", "block", minutes=0)
    assert code == 0
    for section in ("scan", "block"):
        row = results["sections"][section]["Ti B1 T2"]
        assert row["forward"]["cpu"] == row["forward"]["chunked"] == {"error": "no time left"}


def test_a_section_that_breaks_does_not_take_the_others_along(run, program, monkeypatch):
    def broken(_check):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setitem(program.SECTIONS, "ceilings", broken)
    code, results = run("ceilings", "scan")
    assert code == 1 and "misaligned" in results["sections"]["ceilings"]["error"]
    assert "Ti B1 T2" in results["sections"]["scan"]
