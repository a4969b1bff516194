"""Every CUDA kernel of the registry compiles, within its registers and local memory, for each GPU
generation and with each family of NVRTC.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path

import pytest

from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda import nvrtc
from vlm.ops.cuda.registry import INSTANTIATIONS, TF32_INSTANTIATIONS

ARCHITECTURES = tuple(os.environ.get("VLM_GATES", "").split()) or ("sm_80", "sm_90", "sm_100")
HELP = (
    "pip install 'videomamba-vlm[kernels-ci]' (146 MB; no GPU needed), or set VLM_NVRTC to its library file"
)


def installed() -> list[str]:
    """Return the library that ``VLM_NVRTC`` names, or those of installed wheels, one of each family."""
    named = os.environ.get(nvrtc.VARIABLE)
    return [named] if named else [str(path) for major in (12, 13) for path in nvrtc.wheels(major)[:1]]


@functools.cache
def compiler(path: str) -> nvrtc.Nvrtc:
    return nvrtc.Nvrtc(path)


@functools.cache
def compile_once(path: str, source: str, options: tuple[str, ...], arch: str) -> nvrtc.Compiled:
    """Compile a source, which may hold several kernels."""
    text, headers = cuda_library.sources(source)
    return compiler(path).compile(text, headers, options, arch, source)


@pytest.mark.skipif(not installed(), reason=f"no NVRTC: {HELP}")
@pytest.mark.parametrize("path", installed() or [""], ids=lambda path: Path(path).name)
@pytest.mark.parametrize(
    ("wanted", "arch"),
    list(itertools.product((*INSTANTIATIONS, *TF32_INSTANTIATIONS), ARCHITECTURES)),
    ids=str,
)
def test_a_kernel_keeps_its_limits(path, wanted, arch):
    compiled = compile_once(path, wanted.source, wanted.options, arch)
    footprint = compiled.kernels[wanted.entry]
    assert "warning" not in compiled.log, compiled.log
    assert compiled.spill_bytes[wanted.entry] <= wanted.max_spill_bytes, compiled.log
    # arrays that are indexed at run time lie there too, and are as slow
    assert footprint.local_bytes <= wanted.max_spill_bytes, compiled.log
    assert footprint.registers <= wanted.max_registers, compiled.log


@pytest.mark.skipif(
    not os.environ.get("VLM_ALL_NVRTC"), reason="set VLM_ALL_NVRTC=1 where both must be there"
)
def test_both_families_are_there():
    """A gate that skips silently is none, so CI asks for both."""
    assert sorted(compiler(path).version[0] for path in installed()) == [12, 13]
