"""The GPU check as a program: what it writes, what makes it fail, and that all of it runs without a GPU."""

from __future__ import annotations

import json
import os

import pytest
import torch

from vlm.ops import cpu_calls, cpu_library
from vlm.ops.backends import VARIABLE
from vlm.ops.cuda import library as cuda_library

TIMED = {
    "conv": ("forward", "backward"),
    "norm": ("forward", "backward"),
    "scan": ("forward", "backward", "forward_backward"),
    "block": ("forward", "forward_backward"),
    "encoder": ("forward", "forward_backward"),
}


@pytest.fixture
def run(program, tmp_path):
    """``run(*sections)``: exit code and results."""

    def call(*sections, minutes=60, backend="cpu", more=()):
        if backend == "cpu" and not cpu_library.available(torch.float32):
            pytest.skip("no C++ kernels")
        out = tmp_path / "check.json"
        words = ["--device", "cpu", "--backend", backend, "--small", "--seconds", "0", "--out", str(out)]
        words += ["--minutes", str(minutes), *more]
        if sections:
            words += ["--only", ",".join(sections)]
        return program.main(words), json.loads(out.read_text())

    return call


def test_every_section_leaves_its_figures(run, program, capsys):
    code, results = run()
    sections, said = results["sections"], capsys.readouterr().out
    assert code == 0, said
    assert list(sections) == list(program.SECTIONS)
    assert not any("error" in section for section in sections.values())
    for name, jobs in TIMED.items():
        row = sections[name]["Ti B1 T2"]
        assert tuple(row) == jobs
        for job in jobs:
            assert row[job]["cpu"]["median_ms"] > 0
            alone = (name, job) == ("scan", "backward")
            assert alone or row[job]["chunked"]["ratio"] > 0
    for dtype in ("fp32", "bf16", "fp16"):
        assert set(sections["correctness"][dtype]) == {"bi_scan", "conv2", "add_rms_norm"}
    assert 0 < sections["correctness"]["fp32"]["bi_scan"]["gradient"] < 5e-5
    assert sections["official"] == {
        "rival": "chunked",
        "reason": "no sources given",
        "took_s": sections["official"]["took_s"],
    }
    assert set(sections["launches"]["host_us"]) == {"bi_scan", "conv2", "add_rms_norm"}
    assert sections["launches"]["block_forward"]["cpu"]["of"]["vlm::bi_scan"] == 1
    assert {"graphed", "eager"} == set(sections["graphs"]["Ti B1 T2"])
    assert set(sections["polynomial"]["Ti B1 T2"]) == {"0", "2"}
    assert sections["tf32"]["Ti B1 T2"]["tf32"]["forward"]["median_ms"] > 0
    assert sections["memory"]["Ti B1 T2"]["cpu"] == {"peak_mib": None}
    assert (
        sections["decoding"]["h264"]["cpu"]["frames"] == 50 and sections["decoding"]["av1"]["difference"] == 0
    )
    assert 0.5 < sections["structures"]["cpu"]["recall_at_10"] <= 1
    table = said.split("ours ms")[1]
    assert "scan Ti B1 T2 forward " in table and "x" in table and "all numbers right" in table
    assert VARIABLE not in os.environ and torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def emulated(run, part, gpu, monkeypatch, capsys):
    """``emulated(section)``: its figures by the emulated kernels, all of which the first section compiles."""

    def call(section):
        monkeypatch.setattr(part("correctness"), "DTYPES", {"bf16": torch.bfloat16})
        monkeypatch.setattr(part("correctness"), "prove_mixer", lambda _session: {})
        gpu.multiprocessors = 132
        code, results = run(section, backend="cuda")
        assert code == 0, capsys.readouterr().out
        assert gpu.used and set(gpu.used) <= set(part("prepare").wanted())
        return results["sections"][section], [dict(wanted.defines) for wanted in gpu.used]

    return call


@pytest.mark.slow
@pytest.mark.timeout(900)  # most of it compiles
def test_emulated_kernels_are_proved(emulated, gpu):
    found, _ = emulated("correctness")
    assert set(found["bf16"]) == {"bi_scan", "conv2", "add_rms_norm"}
    assert {1e-4 < errors[kind] < 5e-3 for errors in found["bf16"].values() for kind in errors} == {True}
    assert "vlm_scan_backward_carry" in {wanted.entry for wanted in gpu.used}


@pytest.mark.slow
def test_emulated_kernels_are_timed(emulated):
    for section in ("scan", "norm"):
        found, _ = emulated(section)
        assert found["Ti B1 T2"]["backward"]["cuda"]["median_ms"] > 0


@pytest.mark.slow
def test_emulated_kernels_take_a_share_by_polynomial(emulated):
    found, kinds = emulated("polynomial")
    assert {kind.get("VLM_POLYNOMIAL", 0) for kind in kinds} == {0, 2}
    assert 0 <= found["Ti B1 T2"]["2"]["difference"] < 3e-3


@pytest.mark.slow
def test_emulated_kernels_multiply_in_tf32(emulated):
    found, kinds = emulated("tf32")
    assert {kind["VLM_RANK"] for kind in kinds if kind.get("VLM_DIRECTIONS") == 2} == {0, 16}
    assert found["Ti B1 T2"]["fp32"]["error"] < 5e-5 < found["Ti B1 T2"]["tf32"]["error"] < 2e-3


@pytest.mark.slow
def test_emulated_kernels_are_counted(emulated):
    found, _ = emulated("launches")
    assert found["host_us"]["conv2"] > 0 and found["block_forward"]["cuda"]["of"]["vlm::conv2"] == 1


class Idle:
    """A kernel that says what a kernel says of itself, and does nothing."""

    def constant(self, name):
        numbers = {"vlm_norm_geometry": (128, 0, 4, 4, 64)}.get(name, (128, 0, 32, 2))
        return b"".join(number.to_bytes(8, "little") for number in numbers)

    def launch(self, *_):
        """Nothing."""


@pytest.mark.slow
def test_all_kernels_of_the_proofs_are_compiled_beforehand(part, session, gpu, monkeypatch):
    correctness, prepared = part("correctness"), set(part("prepare").wanted())
    used, idle = set(), Idle()
    monkeypatch.setattr(cuda_library, "kernel", lambda wanted, _device: used.add(wanted) or idle)
    monkeypatch.setenv(VARIABLE, "cuda")
    gpu.multiprocessors = 132
    for dtype in correctness.DTYPES.values():
        for proof in correctness.PROOFS:
            arguments, dout = proof.draw(session("cuda"), dtype), torch.zeros(proof.shape, dtype=dtype)
            for plan in ("", "full", "empty"):
                with correctness._as_on(plan):
                    correctness.RUNS[proof.operator](arguments, dout)
                    correctness.RUNS[proof.operator](arguments, None)
    assert used <= prepared, sorted(map(str, used - prepared))
    forward = [dict(each.defines) for each in used if each.entry == "vlm_scan_forward"]
    for macro, values in {
        "VLM_SPLIT": {1, 2, 4},
        "VLM_EVENTS": {0, 1},
        "VLM_ALIGNED": {0, 1},
        "VLM_RANK": {0, 16, 32, 48},
        "VLM_STATES": {8, 16, 32},
        "VLM_IO": {"fp32", "bf16", "fp16"},
    }.items():
        assert {kind[macro] for kind in forward} == values
    assert {each.entry for each in used} == {
        f"vlm_{name}"
        for name in (
            *("scan_forward", "scan_backward", "scan_backward_carry", "sum"),
            *("conv_forward", "conv_backward", "norm_forward", "norm_backward"),
        )
    }


def test_wrong_numbers_end_it_with_one_and_no_ratio_is_printed(run, monkeypatch, capsys):
    right = cpu_calls.bi_scan_forward
    monkeypatch.setattr(
        cpu_calls,
        "bi_scan_forward",
        lambda scans, z, *, save: right([scans[0]._replace(D=scans[0].D * 1.1), *scans[1:]], z, save=save),
    )
    code, results = run("correctness", "scan")
    assert code == 1 and results["is_right"] is False
    said = capsys.readouterr().out
    assert "WRONG bi_scan fp32 b2 L17 " in said and "WRONG mixer" in said and "WRONG NUMBERS" in said
    assert "chunked" not in said.split("scan Ti")[1].split("ours ms")[0]
    assert "ratio" not in results["sections"]["scan"]["Ti B1 T2"]["forward"]["chunked"]


def test_wrong_gradients_are_found_too(run, monkeypatch, capsys):
    right = cpu_calls.bi_scan_backward

    def wrong(*arguments):
        gradients, joined, dz = right(*arguments)
        return gradients, [joined[0], joined[1] * 1.1], dz

    monkeypatch.setattr(cpu_calls, "bi_scan_backward", wrong)
    code, _ = run("correctness")
    said = capsys.readouterr().out
    assert code == 1 and "WRONG bi_scan bf16 b2 L17 e64 {'rank': 16}" in said


def test_what_a_kernel_does_not_write_is_found(run, monkeypatch, capsys):
    right = cpu_calls.conv2_forward
    monkeypatch.setattr(
        cpu_calls, "conv2_forward", lambda *given: (right(*given)[0], torch.empty_like(given[0]))
    )
    code, _ = run("correctness")
    assert code == 1 and "WRONG conv2 fp32 b2 L17" in capsys.readouterr().out


def test_what_does_not_repeat_is_found(run, monkeypatch, capsys):
    right, calls = cpu_calls.conv2_forward, []

    def shaky(*given):
        calls.append(1)
        return tuple(each * (1 + 1e-6 * len(calls)) for each in right(*given))

    monkeypatch.setattr(cpu_calls, "conv2_forward", shaky)
    code, _ = run("correctness")
    assert code == 1 and "repeats False" in capsys.readouterr().out


def test_time_is_shared_out_and_comparisons_are_left_out_first(session):
    shared = session(budget_s=100.0)
    left = []
    for _ in shared.shared_out(("a", "b"), lambda name: {"a": 3, "b": 1}[name]):
        left.append(shared.left_s())
        inner = [shared.left_s() for _ in shared.shared_out((1, 2, 3))]
        assert inner == pytest.approx([left[-1] / 3, left[-1] / 2, left[-1]], abs=1)
    # what the first did not use is the second's
    assert left == pytest.approx([75, 100], abs=1)
    shared._end = 0.0
    assert shared.measured("chunked", lambda: None) == {"error": "no time left"}
    assert shared.measured("cpu", lambda: None)["runs"] == 3
    shared._last = 0.0
    assert shared.measured("cpu", lambda: None) == {"error": "no time left"}


def test_without_time_sections_are_left_out(run):
    code, results = run("scan", "block", minutes=0)
    assert code == 0
    assert {section["error"] for section in results["sections"].values()} == {"no time left"}


def test_what_fails_is_noted_and_ours_is_not_forgiven(session):
    made = session()

    def broken():
        raise RuntimeError("no kernel image")

    def large():
        raise torch.OutOfMemoryError("tried to allocate")

    for name in ("chunked", "cpu"):
        assert made.measured(name, broken) == {"error": "RuntimeError: no kernel image"}
        assert made.is_broken == (name == "cpu")
    made.is_broken = False
    assert made.measured("cpu", large) == {"error": "out of memory"} and made.is_broken


def test_what_of_ours_cannot_be_timed_ends_it_with_one(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(cpu_calls, "conv2_forward", broken)
    code, results = run("conv")
    assert code == 1 and results["sections"]["conv"]["Ti B1 T2"]["backward"]["cpu"]["median_ms"] > 0


def test_without_a_gpu_it_says_what_to_do(program, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        program.main(["--only", "scan"])
    assert "no GPU answers; --device cpu --small" in capsys.readouterr().err


def test_a_section_that_breaks_does_not_take_the_others_along(run, program, monkeypatch, capsys):
    def broken(_session):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setitem(program.SECTIONS, "ceilings", (broken, 1))
    code, results = run("ceilings", "norm")
    assert code == 1 and "misaligned" in results["sections"]["ceilings"]["error"]
    assert "broken" in results["sections"]["ceilings"]["trace"]
    assert results["sections"]["norm"]["Ti B1 T2"]["forward"]["chunked"]["ratio"] > 0
    assert "broken: ceilings" in capsys.readouterr().out


def test_sections_are_named_in_any_order_and_unknown_ones_refused(program, capsys):
    assert program._sections("scan,ceilings") == ["ceilings", "scan"]
    with pytest.raises(SystemExit):
        program.main(["--only", "scam"])
    assert "no section scam; there are prepare, correctness" in capsys.readouterr().err
