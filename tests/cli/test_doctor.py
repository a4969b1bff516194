"""`vlm doctor`: a sound machine passes, each thing that can be wrong is named and fails."""

from __future__ import annotations

import json
import sys
import types

import pytest

from vlm.cli import doctor, main
from vlm.errors import InvalidInput, KernelError


@pytest.fixture
def versions(monkeypatch):
    """Pretend that these distributions are installed, and no others."""

    def pretend(**installed):
        named = {name.replace("_", "-"): version for name, version in installed.items()}
        monkeypatch.setattr(doctor, "_version", named.get)

    return pretend


@pytest.fixture
def broken(monkeypatch):
    """Make the import of one module fail with the given words."""
    found = doctor._import_problem

    def break_module(name, problem):
        monkeypatch.setattr(
            doctor, "_import_problem", lambda asked: problem if asked == name else found(asked)
        )

    return break_module


def the(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_this_machine_is_sound(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert {"python", "vlm", "torch", "scan on cpu", "video", "faiss", "cores", "disk"} <= set(names)
    assert all(finding["status"] != "problem" for finding in report["findings"])


def test_lines_for_people(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "FFmpeg avcodec" in out and out.endswith("everything works\n")


def test_devices_that_decode_are_listed_and_tried(monkeypatch):
    from vlm.data.decoding import hardware
    from vlm.retrieval.ingest import pool

    def check(name):
        if name == "vaapi":
            raise InvalidInput("no such device can be opened here (no DRI); install its driver")

    offered = {"cuda": ("h264", "av1"), "vaapi": ("h264",)}
    monkeypatch.setattr(hardware, "offered_devices", lambda: offered)
    monkeypatch.setattr(pool, "check_device", check)
    findings = list(doctor.check_video())
    assert the(findings, "decode with cuda").text == "h264, av1: vlm index build --decode-with cuda"
    absent = the(findings, "decode with vaapi")
    assert absent.status == "ok" and "not in use" in absent.text and "no DRI" in absent.text


def test_both_builds_of_faiss_are_a_problem(versions, monkeypatch, capsys):
    versions(faiss_cpu="1.15.1", faiss_gpu="1.15.1")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_search,))
    assert main(["doctor"]) == 5
    out = capsys.readouterr().out
    assert "faiss-cpu 1.15.1 and faiss-gpu 1.15.1 share one module" in out and "1 to mend" in out


def test_no_faiss_is_only_a_note(versions):
    versions()
    (finding,) = doctor.check_search()
    assert finding.status == "note" and "exact" in finding.text


def test_a_faiss_that_does_not_load_is_a_problem(versions, broken):
    versions(faiss_gpu="1.15.1")
    broken("faiss", "ImportError: libcudart.so.12: cannot open shared object file")
    (finding,) = doctor.check_search()
    assert finding.status == "problem" and "faiss-gpu 1.15.1: ImportError: libcudart" in finding.text


def test_a_faiss_with_gpus_says_whether_they_are_used(versions, monkeypatch):
    home = pytest.importorskip("vlm.retrieval.backends.faiss")
    versions(faiss_gpu="1.15.1")
    (finding,) = doctor.check_search()
    assert finding.status == "note" and "finds no GPU" in finding.text and "nvidia-smi" in finding.advice
    monkeypatch.setattr(home, "count_gpus", lambda: 2)
    (finding,) = doctor.check_search()
    assert finding.status == "ok" and "search structures on the first of 2 GPUs" in finding.text


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        ("RuntimeError: operator torchvision::nms does not exist", "note"),
        ("ImportError: libc10_cuda.so: cannot open shared object file", "problem"),
    ],
)
def test_a_torchvision_of_another_build_is_named(versions, broken, problem, status):
    versions(torchvision="0.28.0")
    broken("torchvision", problem)
    assert the(doctor.check_torch(), "torchvision").status == status


@pytest.mark.parametrize(("name", "check"), [("torch", doctor.check_torch), ("av", doctor.check_video)])
def test_what_does_not_load_is_a_problem_with_advice(broken, name, check):
    broken(name, "ImportError: broken")
    (finding,) = check()
    assert finding.status == "problem" and "broken" in finding.text and "pip install" in finding.advice


def test_an_old_torch_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert the(doctor.check_torch(), "torch").status == "problem"
    monkeypatch.setattr(torch, "__version__", "2.11.0a0")
    assert the(doctor.check_torch(), "torch").status == "ok"


def test_a_required_module_that_does_not_load_is_named(broken):
    broken("safetensors", "ImportError: no safetensors")
    assert "no safetensors" in the(doctor.check_vlm(), "required").text


def test_a_missing_folder_is_named(monkeypatch, tmp_path):
    import vlm.assets

    (tmp_path / "share" / "configs").mkdir(parents=True)
    monkeypatch.setattr(vlm.assets, "_PACKAGE", tmp_path)
    finding = the(doctor.check_vlm(), "vlm")
    assert finding.status == "problem" and "lacks kernels, data_tools, eval" in finding.text


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def check_luck():
        raise ZeroDivisionError("bad luck")

    monkeypatch.setattr(doctor, "CHECKS", (check_luck, doctor.check_python))
    luck, python = doctor.examine()
    assert (luck.name, luck.status, luck.text) == ("luck", "problem", "ZeroDivisionError: bad luck")
    assert python.status == "ok"


def test_a_full_disk_is_a_note_and_leaves_no_folder(monkeypatch, tmp_path):
    class Usage:
        free = 1e9

    monkeypatch.setenv("VLM_HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: Usage)
    finding = the(doctor.check_machine(), "disk")
    assert finding.status == "note" and "1.0 GB free" in finding.text and "VLM_HOME" in finding.advice
    assert list(tmp_path.iterdir()) == []


def test_a_forced_scan_is_said(monkeypatch):
    monkeypatch.setenv("VLM_SCAN_BACKEND", "chunked")
    finding = the(doctor.check_scan(), "scan on cpu")
    assert finding.status == "note" and finding.text == "chunked, forced by VLM_SCAN_BACKEND"


def test_a_forced_scan_that_cannot_serve_is_a_problem(monkeypatch):
    monkeypatch.setenv("VLM_SCAN_BACKEND", "abacus")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_scan,))
    (finding,) = doctor.examine()
    assert finding.status == "problem" and "VLM_SCAN_BACKEND must be one of" in finding.text


def test_without_a_gpu_the_cuda_kernels_are_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor.check_cuda_kernels()
    assert finding.status == "ok" and finding.text.startswith("not in use: no GPU answers (")
    assert "NVRTC" in finding.text and "driver" in finding.text and "kept in" in finding.text


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, whose kernels do as they are told."""
    from vlm.ops.cuda import library as cuda_library

    class Library:
        reasons = ""
        trouble = None

        def prepare(self, index):
            if self.trouble:
                raise self.trouble
            return cuda_library.Preparation(7, 2, 1.26)

        def reason(self, index):
            return self.reasons

        def architecture(self, index):
            return "sm_90"

    library = Library()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(cuda_library, "library", lambda: library)
    monkeypatch.setattr(cuda_library, "describe", lambda: ["NVRTC 12.8 from /lib", "driver for CUDA 12.8"])
    return library


@pytest.mark.parametrize("conv", ["cuda", "chunked"])
def test_operators_that_do_not_run_on_cuda_kernels_are_named(gpu, monkeypatch, conv):
    from vlm.ops import backends

    monkeypatch.setattr(backends, "_is_trusted", lambda op, _device, _dtype: op != "conv2" or conv == "cuda")
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    finding = the(doctor.check_scan(), "operators on cuda")
    if conv == "cuda":
        assert finding.status == "ok"
        assert finding.text == "cuda: selective_scan, bi_scan, conv2, add_rms_norm"
    else:
        assert finding.status == "note"
        assert finding.text == "cuda: selective_scan, bi_scan, add_rms_norm; chunked: conv2"


def test_a_mamba_ssm_that_could_serve_is_named(gpu, monkeypatch):
    from vlm.ops import backends

    monkeypatch.setattr(backends, "_is_trusted", lambda *_: True)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    finding = the(doctor.check_scan(), "operators on cuda")
    assert finding.status == "ok" and finding.text.endswith("; VLM_SCAN_BACKEND=mamba_ssm can be had")


def test_the_first_use_of_the_cuda_kernels_is_timed(gpu):
    tools, kernels = doctor.check_cuda_kernels()
    assert tools.text == "NVRTC 12.8 from /lib, driver for CUDA 12.8" and tools.status == "ok"
    assert kernels.name == "kernels cuda:0" and kernels.status == "ok"
    assert kernels.text == "7 for sm_90 ready in 1.3 s, 2 of them compiled now"


def test_cuda_kernels_that_fail_their_trial_are_a_problem(gpu):
    gpu.reasons = "a trial on cuda:0 gave wrong numbers"
    finding = the(doctor.check_cuda_kernels(), "kernels cuda:0")
    assert finding.status == "problem" and finding.text == gpu.reasons and "driver" in finding.advice


def test_a_gpu_that_the_kernels_cannot_serve_is_a_note(gpu):
    gpu.trouble = KernelError("the CUDA kernels need compute capability 8.0")
    finding = the(doctor.check_cuda_kernels(), "kernels cuda:0")
    assert finding.status == "note" and "PyTorch serves instead: the CUDA kernels need" in finding.text


def test_memory_is_that_of_the_container(monkeypatch):
    monkeypatch.setattr(doctor.Path, "read_text", lambda _path: "1000\n")
    assert doctor._memory_bytes() == 1000
    monkeypatch.setattr(doctor.Path, "read_text", lambda _path: "max\n")
    whole = doctor._memory_bytes()
    assert sys.platform != "linux" or (whole is not None and whole > 10**8)
