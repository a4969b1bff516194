"""Who serves: the choice, what forcing it does, and what happens when it cannot."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from vlm.errors import KernelError
from vlm.ops import backend, cpu_library, kernel_cache, selective_scan
from vlm.ops.backends import OPERATORS, VARIABLE


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(cpu_library.ISA_VARIABLE, raising=False)


def scan():
    x = torch.ones(1, 2, 3)
    return selective_scan(x, x, -torch.ones(2, 2), torch.ones(1, 2, 3), torch.ones(1, 2, 3))


@pytest.mark.parametrize("op", OPERATORS)
def test_auto_takes_the_kernel_where_there_is_one(op):
    has_kernel = op != "add_rms_norm" and cpu_library.available(torch.float32)
    expected = "cpu" if has_kernel else "chunked"
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backend(op, "cpu", dtype) == expected
    assert backend(op, torch.device("cuda"), torch.float32) == "chunked"


@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_pytorch_backends_serve_everything(name, monkeypatch):
    monkeypatch.setenv(VARIABLE, name)
    assert {backend(op, d, torch.bfloat16) for op in OPERATORS for d in ("cpu", "cuda")} == {name}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("cpu", "cuda", torch.float32, "on cuda; move them to the CPU"),
        ("cpu", "cpu", torch.int32, "cannot serve selective_scan in torch.int32: they take float32"),
        ("cuda", "cpu", torch.float32, "cannot serve selective_scan: they need a CUDA device, got cpu"),
        ("cuda", "cuda", torch.float64, "serves float32, bfloat16 and float16, got torch.float64"),
        ("mamba_ssm", "cpu", torch.float32, "mamba-ssm runs on CUDA only"),
        ("mamba_ssm", "cuda", torch.float64, "serves float32, bfloat16 and float16"),
        ("fastest", "cpu", torch.float32, "must be one of auto, cuda, cpu.*got 'fastest'"),
    ],
)
def test_a_forced_backend_that_cannot_serve_says_what_to_do(name, device, dtype, message, monkeypatch):
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(KernelError, match=message):
        backend("selective_scan", device, dtype)


def test_a_missing_mamba_ssm_is_named(monkeypatch):
    if importlib.util.find_spec("selective_scan_cuda") is not None:
        pytest.skip("mamba-ssm's extension is installed")
    monkeypatch.setenv(VARIABLE, "mamba_ssm")
    with pytest.raises(KernelError, match="selective_scan_cuda cannot be imported.*install mamba-ssm"):
        backend("bi_scan", "cuda", torch.float32)


def test_forcing_reaches_the_operator(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(KernelError, match="they need a CUDA device"):
        scan()
    monkeypatch.setenv(VARIABLE, "reference")
    reference = scan()
    monkeypatch.setenv(VARIABLE, "chunked")
    assert torch.allclose(scan(), reference)


def test_too_many_states_fall_back_or_say_so(monkeypatch):
    if not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    states = cpu_library.MAX_STATES + 1
    x, rows = torch.ones(1, 1, 2), torch.full((1, states, 2), 0.1)
    out = selective_scan(x, x, -torch.ones(1, states), rows, rows)
    assert torch.allclose(out[0, 0, 0], torch.tensor(states * 0.01))
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(KernelError, match="at most 256 states, got 257"):
        selective_scan(x, x, -torch.ones(1, states), rows, rows)


def test_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match="op must be one of selective_scan, bi_scan, conv2, add_rms_norm"):
        backend("scan", "cpu", torch.float32)


def test_import_builds_nothing(tmp_path, root):
    program = "import vlm.ops, vlm.ops.cpu_library as c; assert c._loaded.cache_info().currsize == 0"
    environment = {kernel_cache.VARIABLE: str(tmp_path), "PATH": "", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
