"""Finds, builds and loads the C++ kernels for the CPU: compiled once a machine, or carried by the wheel.

Nothing happens at import. The first question builds ``kernels/cpu`` with the system's C++ compiler into the
user's cache (some seconds); without a compiler the PyTorch implementations serve. The library is plain C
without Python or torch in it, so it outlives both.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vlm.assets import asset
from vlm.errors import InvalidInput, KernelError
from vlm.ops import kernel_cache

ABI = 3
MAX_STATES = 256
MAX_TAPS = 4
# the dispatcher's number of each instruction set, and how the compiler calls it
LEVELS = {"portable": 0, "v3": 3, "v4": 4}
ISA_VARIABLE = "VLM_CPU_ISA"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w")
_SOURCES = ("kernels.cpp", "dispatch.cpp", "problem.h", "vector.h", "scan.h", "conv.h")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LOG = logging.getLogger(__name__)
_is_forked = False


def _note_fork() -> None:
    """Remember, in a forked child, that its parent's OpenMP threads are not there."""
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


class _BuildError(Exception):
    """The library cannot be had; the message says why."""


def available(dtype: torch.dtype) -> bool:
    """Return whether the C++ kernels can serve tensors of ``dtype``; builds them at the first call."""
    return dtype in _DTYPES and not isinstance(_loaded(), str)


def unavailable_reason(dtype: torch.dtype) -> str:
    """Return why ``available`` is false, or an empty string."""
    if dtype not in _DTYPES:
        return f"they take {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
    found = _loaded()
    return found if isinstance(found, str) else ""


def fits(num_states: int) -> bool:
    """Return whether the kernels take so many states; PyTorch serves if not.

    Raises:
        KernelError: They do not, and ``VLM_SCAN_BACKEND=cpu`` forces them.
    """
    if num_states > MAX_STATES and os.environ.get("VLM_SCAN_BACKEND") == "cpu":
        raise KernelError(
            f"VLM_SCAN_BACKEND=cpu, but the C++ kernels take at most {MAX_STATES} states, got {num_states}; "
            "use chunked"
        )
    return num_states <= MAX_STATES


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        KernelError: It cannot be built or loaded.
    """
    found = _loaded()
    if isinstance(found, str):
        raise KernelError(f"the C++ kernels are not available: {found}; use VLM_SCAN_BACKEND=chunked")
    return found


def num_threads() -> int:
    """Return how many threads a call may use: torch's number, and one in a forked child.

    OpenMP's pool of threads does not survive a fork; a child that asked for it would wait for ever. The same
    is true of torch's own operators: such a child should call ``torch.set_num_threads(1)``.
    """
    return 1 if _is_forked else torch.get_num_threads()


def describe() -> str:
    """Return one line for reports: which kernels serve on this processor, or why none do."""
    found = _loaded()
    if isinstance(found, str):
        return f"PyTorch ({found})"
    names = {number: name for name, number in LEVELS.items()}
    return f"C++ {names[level()]} from {found._name}"


def level() -> int:
    """Return the instruction set in use: the processor's best, or a lower one named by ``VLM_CPU_ISA``.

    Raises:
        KernelError: ``VLM_CPU_ISA`` is unknown or beyond this processor.
    """
    best = _best_level()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return best
    if wanted not in LEVELS or LEVELS[wanted] > best:
        usable = [name for name, number in LEVELS.items() if number <= best]
        raise KernelError(
            f"{ISA_VARIABLE} must be one of {', '.join(usable)} on this processor, got {wanted!r}"
        )
    return LEVELS[wanted]


@functools.cache
def _best_level() -> int:
    """Return what the processor supports."""
    return int(library().vlm_best_level())


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none."""
    try:
        return _open(_prebuilt() or _built())
    except (_BuildError, kernel_cache.NoCacheFolder, OSError, InvalidInput) as error:
        _LOG.info("no C++ kernels: %s", error)
        return str(error)


def _open(path: Path) -> ctypes.CDLL:
    """Load a library and check that it is the one this code was written for."""
    loaded = ctypes.CDLL(str(path))
    if not hasattr(loaded, "vlm_abi"):
        raise _BuildError(f"{path} is not this package's library")
    loaded.vlm_abi.restype = ctypes.c_int64
    if (abi := loaded.vlm_abi()) != ABI:
        raise _BuildError(f"{path} has interface {abi}, this version needs {ABI}")
    for name in ("vlm_scan", "vlm_conv2"):
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return loaded


def _prebuilt() -> Path | None:
    """Return the library that an installed wheel carries, if there is one."""
    try:
        return asset("kernels/cpu/libvlm_cpu.so")
    except InvalidInput:
        return None


def _built() -> Path:
    """Return the library from the cache, compiling it first if it is missing or damaged."""
    compiler = _compiler()
    sources = {name: asset(f"kernels/cpu/{name}").read_bytes() for name in _SOURCES}
    folder = kernel_cache.folder()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    flags = " ".join(_FLAGS).encode()
    key = kernel_cache.key(compiler.encode(), version, flags, platform.machine().encode(), *sources.values())
    target = folder / f"libvlm_cpu-{key}.so"
    kernel_cache.entry(target, lambda work: _compile(compiler, sources, work))
    return target


def _compiler() -> str:
    """Return the path of the C++ compiler."""
    wanted = os.environ.get("CXX") or "g++"
    for name in (wanted, "c++", "clang++") if not os.environ.get("CXX") else (wanted,):
        if found := shutil.which(name):
            return found
    raise _BuildError(f"no C++ compiler ({wanted}) found; install g++ for the fast CPU kernels")


def _compile(compiler: str, sources: dict[str, bytes], work: Path) -> Path:
    """Compile every variant side by side and link them."""
    _LOG.info("compiling the C++ kernels (once, some seconds)")
    variants = _variants()
    for source, content in sources.items():
        (work / source).write_bytes(content)
    threads = ["-fopenmp"] if _compiles(compiler, ["-fopenmp"], work) else []
    commands = [
        [compiler, *_FLAGS, *threads, *flags, f"-DVLM_ISA={isa}", "-c", "kernels.cpp", "-o", f"{isa}.o"]
        for isa, flags in variants.items()
    ]
    commands.append([compiler, *_FLAGS, "-c", "dispatch.cpp", "-o", "dispatch.o"])
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(lambda command: _run(command, work), commands))
    objects = [f"{isa}.o" for isa in variants]
    _run([compiler, "-shared", *threads, "dispatch.o", *objects, "-o", "library.so"], work)
    return work / "library.so"


def _variants() -> dict[str, list[str]]:
    """Return the instruction sets to compile for, with the compiler's flags."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": []}
    return {"portable": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}


def _compiles(compiler: str, flags: list[str], work: Path) -> bool:
    """Return whether a program with ``flags`` compiles and links."""
    (work / "probe.cpp").write_text("int main() { return 0; }\n")
    command = [compiler, *flags, "probe.cpp", "-o", "probe"]
    return subprocess.run(command, cwd=work, capture_output=True, check=False).returncode == 0


def _run(command: list[str], work: Path) -> None:
    """Run one compiler command."""
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
