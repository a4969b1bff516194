"""The C++ library: built once, by one of many, rebuilt when damaged, done without when impossible."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from vlm.errors import KernelError
from vlm.ops import backend, cpu_library, kernel_cache, selective_scan
from vlm.ops.backends import VARIABLE

# stands in for a compiler: notes each call, and links by copying the library that this machine built before
COMPILER = """#!/bin/sh
echo call >> "{folder}/calls"
for last in "$@"; do :; done
case "$*" in
  *--version*) echo stand-in ;;
  *-shared*) sleep 0.1; cp "{library}" "$last" ;;
esac
"""


@pytest.fixture
def nothing_loaded():
    """Forget the library before and after."""
    cpu_library._loaded.cache_clear()
    cpu_library._best_level.cache_clear()
    yield
    cpu_library._loaded.cache_clear()
    cpu_library._best_level.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch, request):
    """An empty cache and a quick compiler."""
    if not cpu_library.available(torch.float32):
        pytest.skip(f"no C++ kernels: {cpu_library.unavailable_reason(torch.float32)}")
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER.format(folder=tmp_path, library=cpu_library.library()._name))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    request.getfixturevalue("nothing_loaded")
    return tmp_path / "cache" / "kernels"


def built(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def scan():
    x = torch.ones(1, 2, 3)
    return selective_scan(x, x, -torch.ones(2, 2), torch.ones(1, 2, 3), torch.ones(1, 2, 3))


def test_built_once_then_found(cache, monkeypatch):
    assert cpu_library.available(torch.float32)
    library = built(cache)
    first = library.stat().st_mtime_ns
    assert {p.suffix for p in cache.iterdir()} == {".so", ".sha256", ".lock"}
    cpu_library._loaded.cache_clear()
    monkeypatch.setattr(cpu_library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cpu_library.available(torch.float32)
    assert library.stat().st_mtime_ns == first
    assert str(library) in cpu_library.describe()


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "no digest"])
def test_a_damaged_cache_is_rebuilt(cache, damage):
    expected = scan()
    library = built(cache)
    content = library.read_bytes()
    # a new file, as the old one is mapped into this process
    library.unlink()
    contents = {
        "torn": content[: len(content) // 2],
        "garbage": os.urandom(5000),
        "empty": b"",
        "no digest": content,
    }
    library.write_bytes(contents[damage])
    if damage == "no digest":
        library.with_suffix(".sha256").unlink()
    cpu_library._loaded.cache_clear()
    assert torch.equal(scan(), expected)
    assert backend("bi_scan", "cpu", torch.float32) == "cpu"
    assert built(cache).read_bytes() == content


def test_those_that_start_together_share_one_build(cache, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(cpu_library._built())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [built(cache)] * 4
    # each asks for the version; one of them probes, compiles each file and links
    files = 1 + len(cpu_library._variants())
    assert len((tmp_path / "calls").read_text().split()) == 4 + 1 + files + 1


def test_without_a_compiler_pytorch_serves(tmp_path, monkeypatch):
    with_kernels = scan()
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    cpu_library._loaded.cache_clear()
    try:
        assert backend("selective_scan", "cpu", torch.float32) == "chunked"
        assert torch.allclose(scan(), with_kernels)
        monkeypatch.setenv(VARIABLE, "cpu")
        with pytest.raises(
            KernelError, match="no C.. compiler .g... found; install.*use VLM_SCAN_BACKEND=chunked"
        ):
            scan()
    finally:
        cpu_library._loaded.cache_clear()


def test_a_compiler_that_fails_is_reported(tmp_path, monkeypatch, nothing_loaded):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    assert not cpu_library.available(torch.float32)
    assert "out of cheese" in cpu_library.unavailable_reason(torch.float32)
    assert cpu_library.describe().startswith("PyTorch (")
    with pytest.raises(KernelError, match="out of cheese"):
        cpu_library.library()
    assert not list((tmp_path / "cache" / "kernels").glob("*.so"))


def test_a_folder_others_can_write_is_not_trusted(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path))
    assert kernel_cache.folder() != folder


def test_a_library_of_another_version_is_refused(cache, monkeypatch):
    assert cpu_library.available(torch.float32)
    cpu_library._loaded.cache_clear()
    monkeypatch.setattr(cpu_library, "ABI", cpu_library.ABI + 1)
    assert "interface" in cpu_library.unavailable_reason(torch.float32)


def test_instruction_set_beyond_the_processor_is_refused(monkeypatch):
    if not cpu_library.available(torch.float32):
        pytest.skip("no C++ kernels")
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "v5")
    with pytest.raises(KernelError, match="VLM_CPU_ISA must be one of portable.*got 'v5'"):
        cpu_library.level()
