"""NVRTC: found in the right order, sees nothing but what it is given, says what it did, fails in words.

Tests that compile run with every NVRTC that is installed, and are skipped where there is none.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from vlm.errors import KernelError
from vlm.ops.cuda import cubin, nvrtc

SOURCE = """
#include "twice.cuh"
struct Problem { float *out; const float *in; long long count; char kind; };
extern "C" {
__constant__ long long geometry[3] = {128, 70208, -2};
__global__ void vlm_twice(const Problem p) {
  __shared__ float room[FLOATS];
  room[threadIdx.x % FLOATS] = p.in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < p.count) p.out[threadIdx.x] = twice(room[(threadIdx.x + 1) % FLOATS]);
}
// more live values than 32 registers hold
__global__ void __launch_bounds__(1024, 2) vlm_spilling(float *out, const float *in) {
  float v[60];
#pragma unroll
  for (int i = 0; i < 60; ++i) v[i] = in[i * threadIdx.x];
  for (int k = 0; k < 99; ++k)
#pragma unroll
    for (int i = 0; i < 60; ++i) v[i] = v[i] * v[(i + 7) % 60] + in[k];
#pragma unroll
  for (int i = 0; i < 60; ++i) out[i] = v[i];
}
}
"""
HEADERS = {"twice.cuh": "__device__ inline float twice(float x) { return 2 * x; }\n"}
OPTIONS = ("-DFLOATS=100",)


def installed() -> list[str]:
    """Return the libraries that a developer named or installed, one of each family."""
    named = os.environ.get(nvrtc.VARIABLE)
    return [named] if named else [str(path) for major in (12, 13) for path in nvrtc.wheels(major)[:1]]


@pytest.fixture(params=installed() or [None], ids=lambda path: os.path.basename(path) if path else "none")
def compiler(request) -> nvrtc.Nvrtc:
    if request.param is None:
        pytest.skip(
            "no NVRTC: pip install 'videomamba-vlm[kernels-ci]', or set VLM_NVRTC to its library file"
        )
    return nvrtc.Nvrtc(request.param)


@pytest.fixture
def nothing_found():
    nvrtc.find.cache_clear()
    yield
    nvrtc.find.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """A compiler that loads anything, and notes what it was asked to load."""
    tried = []

    class StandIn:
        def __init__(self, path):
            tried.append(path)
            if not os.path.exists(path):
                raise OSError(f"{path}: cannot open shared object file")
            self.path = path

    monkeypatch.setattr(nvrtc, "Nvrtc", StandIn)
    return tried


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_what_the_module_says_is_what_the_assembler_said(compiler, arch):
    compiled = compiler.compile(SOURCE, HEADERS, OPTIONS, arch)
    said = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack.*?Used (\d+) reg", compiled.log, re.DOTALL)
    footprints = {name: (f.local_bytes, f.registers) for name, f in compiled.kernels.items()}
    assert footprints == {name: (int(stack), int(registers)) for name, stack, registers in said}
    assert set(footprints) == {"vlm_twice", "vlm_spilling"}
    assert compiled.kernels["vlm_twice"].parameter_bytes == 32  # two pointers, a long long, a padded char
    assert compiled.shared_bytes == {"vlm_twice": 400, "vlm_spilling": 0}
    assert compiled.spill_bytes["vlm_twice"] == 0 == compiled.kernels["vlm_twice"].local_bytes
    assert compiled.spill_bytes["vlm_spilling"] > 100 and compiled.kernels["vlm_spilling"].local_bytes > 100
    geometry = memoryview(cubin.constant(compiled.cubin, "geometry")).cast("q").tolist()
    assert geometry == [128, 70208, -2]
    with pytest.raises(KeyError):
        cubin.constant(compiled.cubin, "geography")


def test_a_mistake_is_shown_with_its_line(compiler):
    with pytest.raises(KernelError, match=r"(?s)could not compile scan\.cu for sm_90.*scan\.cu\(2\): error"):
        compiler.compile("// a scan\nblah\n", {}, (), "sm_90", "scan.cu")


@pytest.mark.parametrize("include", ['"foreign.cuh"', "<foreign.cuh>", "<cuda_fp16.h>", "<cstdint>"])
def test_nothing_but_the_given_headers_is_seen(compiler, include, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.cuh").write_text("#define FOREIGN 1\n")
    with pytest.raises(KernelError, match="could not open source file"):
        compiler.compile(f"#include {include}\n", HEADERS, (), "sm_90")


def test_a_given_header_goes_before_one_in_the_working_directory(compiler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.cuh").write_text("#error foreign\n")
    assert "vlm_twice" in compiler.compile(SOURCE, HEADERS, OPTIONS, "sm_90").kernels


def test_an_unknown_architecture_is_refused(compiler):
    with pytest.raises(KernelError, match="gpu-architecture"):
        compiler.compile(SOURCE, HEADERS, OPTIONS, "sm_35")


def test_architecture_is_the_gpus_or_its_generations_first(compiler):
    assert {80, 90, 100} <= set(compiler.architectures)
    assert compiler.architecture((9, 0)) == "sm_90"
    assert compiler.architecture((8, 6)) == "sm_86"
    assert compiler.architecture((8, 4)) == "sm_80"
    assert compiler.architecture((10, 9)) == "sm_100"
    with pytest.raises(KernelError, match=r"cannot compile for compute capability 77\.0.*install a PyTorch"):
        compiler.architecture((77, 0))


def test_versions_are_told_apart(compiler):
    expected = 13 if ".so.13" in compiler.path else 12
    assert compiler.version[0] == expected and compiler.label == f"{expected}.{compiler.version[1]}"
    assert compiler.version >= (12, 8), "older compilers are not what CI holds the kernels to"


def test_a_cubin_is_read_without_a_compiler(fixtures):
    # kernels/cuda/probe.cu, compiled by NVRTC 12.8.93 for sm_90
    image = (fixtures / "cuda" / "probe-sm_90.cubin").read_bytes()
    assert cubin.footprints(image) == {"vlm_probe": cubin.Footprint(10, 0, 24)}


@pytest.mark.parametrize("damage", ["empty", "text", "half", "header only", "sections swapped for noise"])
def test_what_is_no_cubin_is_refused(fixtures, damage):
    image = (fixtures / "cuda" / "probe-sm_90.cubin").read_bytes()
    damaged = {
        "empty": b"",
        "text": b"not a cubin at all",
        "half": image[: len(image) // 2],
        "header only": image[:64],
        "sections swapped for noise": image[:64] + bytes(range(256)) * 20,
    }[damage]
    with pytest.raises(ValueError, match="cubin"):
        cubin.footprints(damaged)


def test_a_named_library_is_the_only_one_tried(stand_in, nothing_found, tmp_path, monkeypatch):
    library = tmp_path / "libnvrtc.so.12"
    library.touch()
    monkeypatch.setenv(nvrtc.VARIABLE, str(library))
    assert nvrtc.find().path == str(library)
    assert stand_in == [str(library)]


def test_a_named_library_that_does_not_load_is_an_error(nothing_found, tmp_path, monkeypatch):
    (tmp_path / "libnvrtc.so.12").write_text("not a library")
    monkeypatch.setenv(nvrtc.VARIABLE, str(tmp_path / "libnvrtc.so.12"))
    with pytest.raises(KernelError, match="VLM_NVRTC must name NVRTC's library file, got .*libnvrtc.so.12"):
        nvrtc.find()


@pytest.mark.parametrize(("ours", "first"), [("12.8", 12), ("13.0", 13), (None, 13)])
def test_torchs_own_version_is_tried_before_others(
    stand_in, nothing_found, tmp_path, monkeypatch, ours, first
):
    monkeypatch.delenv(nvrtc.VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", ours)
    monkeypatch.setattr(nvrtc, "_loaded", lambda major: iter(()))
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(nvrtc.sys, "path", [])
    for path in nvrtc._WHEELS.values():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert nvrtc.find().path == str(tmp_path / nvrtc._WHEELS[first])
    # the wheels go before whatever the system has
    names = list(nvrtc.candidates())
    assert names[:2] == [str(tmp_path / nvrtc._WHEELS[major]) for major in (first, 25 - first)]
    assert {"libnvrtc.so.12", "libnvrtc.so.13"} <= set(names[2:])


def test_what_the_process_has_loaded_goes_first(compiler):
    loaded = [path for major in (12, 13) for path in nvrtc._loaded(major)]
    assert os.path.realpath(compiler.path) in loaded
    assert set(list(nvrtc.candidates())[: len(loaded)]) == set(loaded)


@pytest.mark.parametrize(
    ("ours", "package"), [("12.8", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc")]
)
def test_without_one_the_package_to_install_is_named(
    stand_in, nothing_found, monkeypatch, tmp_path, ours, package
):
    monkeypatch.delenv(nvrtc.VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", ours)
    monkeypatch.setattr(nvrtc, "candidates", lambda: iter([str(tmp_path / "libnvrtc.so.12")]))
    with pytest.raises(KernelError, match=f"pip install {package}, or set VLM_NVRTC"):
        nvrtc.find()
    assert len(stand_in) == 1
