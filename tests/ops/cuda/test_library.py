"""CUDA kernels: compiled once by one of many, found again, rebuilt when damaged, tried before they serve.

A library that plays the driver stands in for a GPU; the tests at the end run on a real one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vlm.errors import KernelError
from vlm.ops import kernel_cache
from vlm.ops.cuda import driver as cuda_driver
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import nvrtc
from vlm.ops.cuda.registry import INSTANTIATIONS, PROBE, Instantiation


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def num_loaded(fake) -> int:
    return fake.fake_log().decode().splitlines().count("cuModuleLoadData")


class FakeCompiler:
    """Gives the same module for everything, and keeps count."""

    def __init__(self, image, label="12.8"):
        self.image = image
        self.label = label
        self.asked = []

    def architecture(self, capability):
        return f"sm_{capability[0]}{capability[1]}"

    def compile(self, source, headers, options, arch, name):
        self.asked.append((source, dict(headers), tuple(options), arch, name))
        return nvrtc.Compiled(self.image, "", {}, {}, {})


def test_each_device_has_its_own_copy_and_loads_it_once(fake, driver, image, cache):
    compiler = FakeCompiler(image)
    compiler.architecture = lambda capability: "sm_90"
    library = cuda_library.Library(driver, compiler)
    driver.capability = lambda index: (9, 0)
    first = library.kernel(PROBE, 0)
    assert library.kernel(PROBE, 0) is first and library.kernel(PROBE, 1) is not first
    assert num_loaded(fake) == 2 and len(compiler.asked) == 1
    assert library.prepare(0, [PROBE]) == cuda_library.Preparation(1, 0, pytest.approx(0.0, abs=60))


def test_threads_that_ask_together_get_one_kernel(fake, driver, image, cache):
    compiler = FakeCompiler(image)
    library = cuda_library.Library(driver, compiler)
    fake.fake_reset(24)
    found = []
    threads = [threading.Thread(target=lambda: found.append(library.kernel(PROBE, 0))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(map(id, found))) == 1
    assert len(compiler.asked) == 1 and num_loaded(fake) == 1


def test_a_gpu_that_is_too_old_is_named(driver, image, cache):
    library = cuda_library.Library(driver, FakeCompiler(image))
    assert library.architecture(0) == "sm_90"
    with pytest.raises(KernelError, match=r"need compute capability 8\.0 or later, cuda:1 has 7\.5"):
        library.kernel(PROBE, 1)
    assert "cuda:1 has 7.5" in library.reason(1)


# the cache


def test_compiled_once_then_found(image, cache):
    compiler = FakeCompiler(image)
    first = cuda_library.image(PROBE, "sm_90", compiler)
    assert first.is_new and first.content == image and first.path.parent == cache
    again = cuda_library.image(PROBE, "sm_90", compiler)
    assert not again.is_new and again.content == image and len(compiler.asked) == 1
    source, headers, options, arch, name = compiler.asked[0]
    assert "vlm_probe" in source and options == () and arch == "sm_90" and name == "probe.cu"
    assert all(header.endswith(".cuh") for header in headers)


def test_every_part_of_the_key_counts(image, cache, monkeypatch):
    def path(wanted=PROBE, arch="sm_90", label="12.8", source="__global__", headers=(("a.cuh", "1"),)):
        monkeypatch.setattr(cuda_library, "sources", lambda name: (source, dict(headers)))
        return cuda_library.image(wanted, arch, FakeCompiler(image, label)).path

    found = [
        path(),
        path(arch="sm_80"),
        path(label="13.0"),
        path(Instantiation("probe.cu", "vlm_probe", (("A", 1),))),
        path(Instantiation("probe.cu", "vlm_probe", (("A", 2),))),
        path(source="__global__ "),
        path(headers=(("a.cuh", "2"),)),
        path(headers=(("b.cuh", "1"),)),
    ]
    assert len(set(found)) == len(found)
    assert path() == found[0]


def test_parts_of_a_key_do_not_run_together():
    assert kernel_cache.key(b"ab", b"c") != kernel_cache.key(b"a", b"bc")
    assert kernel_cache.key(b"a\0b") != kernel_cache.key(b"a", b"b")


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "no digest", "garbled digest", "of another"])
def test_a_damaged_entry_is_rebuilt(image, cache, damage):
    compiler = FakeCompiler(image)
    path = cuda_library.image(PROBE, "sm_90", compiler).path
    digest = kernel_cache.digest_path(path)
    if damage == "of another":
        # a whole entry, but of another architecture: somebody moved it here
        compiler.image = image + b"other"
        other = cuda_library.image(PROBE, "sm_80", compiler).path
        compiler.image = image
        other.replace(path)
        kernel_cache.digest_path(other).replace(digest)
    elif damage == "no digest":
        digest.unlink()
    elif damage == "garbled digest":
        digest.write_bytes(b"\xff\xfe\x00")
    else:
        changed = bytes([image[0] ^ 1]) + image[1:]
        path.write_bytes({"torn": image[:1000], "flipped": changed, "empty": b""}[damage])
    before = len(compiler.asked)
    again = cuda_library.image(PROBE, "sm_90", compiler)
    assert again.is_new and again.content == image and len(compiler.asked) == before + 1
    assert path.read_bytes() == image
    assert not cuda_library.image(PROBE, "sm_90", compiler).is_new


def test_what_a_killed_builder_left_is_removed(image, cache):
    compiler = FakeCompiler(image)
    path = cuda_library.image(PROBE, "sm_90", compiler).path
    path.unlink()
    left = path.with_name(f"{path.name}.work-killed")
    left.mkdir()
    (left / "image").write_bytes(b"half")
    foreign = cache / "notes.txt"
    foreign.write_text("not ours")
    assert cuda_library.image(PROBE, "sm_90", compiler).content == image
    assert not left.exists() and foreign.read_text() == "not ours"
    assert {p.name for p in cache.iterdir()} == {
        path.name,
        kernel_cache.digest_path(path).name,
        f"{path.name}.lock",
        "notes.txt",
    }


def test_a_compilation_that_fails_leaves_nothing(image, cache):
    compiler = FakeCompiler(image)

    def fail(*_):
        raise KernelError("out of cheese")

    compiler.compile = fail
    for _ in range(2):
        with pytest.raises(KernelError, match="out of cheese"):
            cuda_library.image(PROBE, "sm_90", compiler)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("trouble", ["no folder", "full disk"])
def test_without_a_place_to_keep_it_a_kernel_still_compiles(image, cache, monkeypatch, trouble, caplog):
    compiler = FakeCompiler(image)
    if trouble == "no folder":

        def nowhere():
            raise kernel_cache.NoCacheFolder("no private writable cache folder")

        monkeypatch.setattr(kernel_cache, "folder", nowhere)
    else:

        def full(_self, _content):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    made = cuda_library.image(PROBE, "sm_90", compiler)
    assert made == cuda_library.Image(image, None, True) and len(compiler.asked) == 1
    assert "cannot be kept" in caplog.text


PROCESS = """
import sys, time
from pathlib import Path
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import nvrtc
from vlm.ops.cuda.registry import PROBE

class Compiler:
    label = "12.8"
    def compile(self, source, headers, options, arch, name):
        with Path(sys.argv[1]).open("a") as calls:
            calls.write("call ")
        time.sleep(0.5)
        return nvrtc.Compiled(b"compiled" * 1000, "", {}, {}, {})

Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.01)
content = cuda_library.image(PROBE, "sm_90", Compiler()).content
print("compiled" if content == b"compiled" * 1000 else "something else")
"""


def test_processes_that_start_together_share_one_compilation(cache, tmp_path, root):
    log, start = tmp_path / "calls", tmp_path / "start"
    ready = [tmp_path / f"ready{number}" for number in range(2)]
    environment = {"PYTHONPATH": str(root), kernel_cache.VARIABLE: str(cache.parent), "PATH": "/usr/bin:/bin"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(log), str(mine), str(start)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for mine in ready
    ]
    while not all(mine.exists() for mine in ready) and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    start.touch()
    assert [process.communicate()[0].strip() for process in processes] == ["compiled"] * 2
    assert log.read_text() == "call "


# who serves


@pytest.fixture
def nothing_found():
    found = cuda_library._found
    found.cache_clear()
    yield
    found.cache_clear()


def test_without_a_gpu_the_reason_is_said(monkeypatch, nothing_found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not cuda_library.available("cuda:0")
    assert cuda_library.unavailable_reason("cuda:0") == "no GPU answers"
    assert cuda_library.unavailable_reason("cpu") == "they need a CUDA device, got cpu"
    with pytest.raises(KernelError, match="not available: no GPU answers; use VLM_SCAN_BACKEND=chunked"):
        cuda_library.kernel(PROBE, 0)


def test_without_a_compiler_the_reason_is_said(fake, driver, monkeypatch, nothing_found):
    def absent():
        raise KernelError("NVRTC was not found; pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_driver, "find", lambda: driver)
    monkeypatch.setattr(nvrtc, "find", absent)
    assert "pip install nvidia-cuda-nvrtc" in cuda_library.unavailable_reason(0)
    assert not cuda_library.available(torch.device("cuda", 0))


@pytest.mark.parametrize("outcome", ["right", "wrong numbers", "launch fails"])
def test_a_device_is_tried_once_before_it_serves(driver, image, cache, monkeypatch, nothing_found, outcome):
    library = cuda_library.Library(driver, FakeCompiler(image))
    tried = []

    def run(kernel, out):
        tried.append(kernel.index)
        if outcome == "launch fails":
            raise KernelError("CUDA_ERROR_INVALID_IMAGE")
        out.copy_(torch.tensor(cuda_library.probe_pattern(), dtype=torch.int32))
        out[-1] += outcome != "right"

    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_library, "_found", lambda: library)
    monkeypatch.setattr(cuda_library, "run_probe", run)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    reasons = {cuda_library.unavailable_reason("cuda:0") for _ in range(3)}
    expected = {
        "right": "",
        "wrong numbers": "gave wrong numbers",
        "launch fails": "CUDA_ERROR_INVALID_IMAGE",
    }
    assert len(reasons) == 1 and expected[outcome] in reasons.pop()
    assert cuda_library.available("cuda:0") == (outcome == "right")
    assert tried == [0]


def test_no_trial_while_a_graph_is_captured(driver, image, cache, monkeypatch):
    library = cuda_library.Library(driver, FakeCompiler(image))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(library, "_trial", lambda index: pytest.fail("tried"))
    assert library.reason(0) == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(library, "_trial", lambda index: "broken")
    assert library.reason(0) == "broken"


def test_the_registry_names_what_is_shipped(root):
    assert PROBE in INSTANTIATIONS and len(set(INSTANTIATIONS)) == len(INSTANTIATIONS)
    for wanted in INSTANTIATIONS:
        source, headers = cuda_library.sources(wanted.source)
        assert wanted.entry in source
        for text in (source, *headers.values()):
            assert "#include <" not in text


def test_an_instantiation_reads_well():
    wanted = Instantiation("scan.cu", "vlm_scan", (("VLM_IO", "bf16"), ("VLM_STATES", 16)))
    assert str(wanted) == "vlm_scan (io bf16, states 16)" and str(PROBE) == "vlm_probe"
    assert wanted.options == ("-DVLM_IO=bf16", "-DVLM_STATES=16")


# on a GPU


@pytest.fixture
def real_library(nothing_found):
    reason = cuda_library.unavailable_reason("cuda:0")
    if reason:
        pytest.skip(reason)
    return cuda_library.library()


@pytest.mark.requires_cuda
@pytest.mark.parametrize("count", [1, 127, 128, 129, 100_001])
def test_the_probe_writes_its_pattern_on_any_stream(real_library, count):
    side = torch.cuda.Stream()
    out = torch.zeros(count, dtype=torch.int32, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cuda_library.run_probe(real_library.kernel(PROBE, 0), out)
        found = out.tolist()
    assert found == cuda_library.probe_pattern(count)


@pytest.mark.requires_cuda
def test_a_graph_captures_launches_and_replays_them(real_library):
    out = torch.zeros(1000, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    # a kernel that this process has not loaded: loading must not break the capture
    fresh = Instantiation("probe.cu", "vlm_probe", (("VLM_UNUSED", 1),))
    with torch.cuda.graph(graph):
        cuda_library.run_probe(real_library.kernel(fresh, 0), out)
    assert out.sum().item() == 0
    graph.replay()
    assert out.tolist() == cuda_library.probe_pattern(1000)


@pytest.mark.requires_cuda
def test_a_new_thread_can_launch(real_library):
    out = torch.zeros(1000, dtype=torch.int32, device="cuda")
    thread = threading.Thread(target=lambda: cuda_library.run_probe(real_library.kernel(PROBE, 0), out))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert out.tolist() == cuda_library.probe_pattern(1000)
