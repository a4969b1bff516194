"""Compiles CUDA C++ with NVRTC, the run-time compiler that every CUDA build of PyTorch brings. Needs no GPU.

The library is reached through its C interface. Sources see nothing but the headers they are given: no
toolkit, no folder of the disk.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm.errors import KernelError
from vlm.ops.cuda.cubin import Footprint, footprints

VARIABLE = "VLM_NVRTC"
# the two families, and where their wheels put the library
_WHEELS = {13: "nvidia/cu13/lib/libnvrtc.so.13", 12: "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"}
_PACKAGES = {13: "nvidia-cuda-nvrtc", 12: "nvidia-cuda-nvrtc-cu12"}
# without the second option, NVRTC also looks for headers in the working directory
OPTIONS = ("--std=c++17", "--no-source-include", "--ptxas-options=-v")
_MOST_OF_LOG = 4000
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used \d+ registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compilation gave.

    Attributes:
        cubin: The module, for one architecture.
        log: What compiler and assembler said.
        kernels: Registers, local memory and parameters of each kernel, as the module itself says.
        spill_bytes: Stores and loads of spilled registers in each kernel, as the assembler said.
        shared_bytes: Static shared memory of each kernel, as the assembler said.
    """

    cubin: bytes
    log: str
    kernels: dict[str, Footprint]
    spill_bytes: dict[str, int]
    shared_bytes: dict[str, int]


class Nvrtc:
    """One NVRTC library.

    Attributes:
        path: Where it lies, or the name under which the system's loader found it.
        version: For example (12, 8).
        architectures: What it can compile for, ascending: 80 is ``sm_80``.
    """

    def __init__(self, path: str) -> None:
        """Load the library.

        Raises:
            OSError: It cannot be loaded, or is not NVRTC.
        """
        self.path = path
        _load_builtins(path)
        self._library = ctypes.CDLL(path)
        if not hasattr(self._library, "nvrtcGetCUBIN"):
            raise OSError(f"{path} is not NVRTC 11.1 or later")
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
        self.version = (major.value, minor.value)
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "architectures")
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers), "architectures")
        self.architectures = tuple(sorted(numbers))

    def architecture(self, capability: tuple[int, int]) -> str:
        """Return the architecture to compile for, ``sm_90`` for a GPU of compute capability (9, 0).

        A GPU that the library does not know runs the code of its generation's first one.

        Raises:
            KernelError: The library knows none of that major number.
        """
        major, minor = capability
        known = [n for n in (10 * major + minor, 10 * major) if n in self.architectures]
        if not known:
            raise KernelError(
                f"NVRTC {self.label} ({self.path}) cannot compile for compute capability {major}.{minor}; "
                "install a PyTorch built for a CUDA version that knows this GPU"
            )
        return f"sm_{known[0]}"

    @property
    def label(self) -> str:
        """The version as text."""
        return f"{self.version[0]}.{self.version[1]}"

    def compile(
        self,
        source: str,
        headers: Mapping[str, str],
        options: Sequence[str],
        arch: str,
        name: str = "kernel.cu",
    ) -> Compiled:
        """Compile ``source`` for one architecture.

        Args:
            source: CUDA C++.
            headers: The text of everything that it may include, by the name it is included under.
            options: More options of the compiler, such as ``-DVLM_STATES=16``.
            arch: For example ``sm_90``.
            name: What messages call the source.

        Raises:
            KernelError: It does not compile; the message has the compiler's log.
        """
        call = self._library
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
        code = call.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
        )
        self._check(code, name)
        try:
            words = [f"--gpu-architecture={arch}", *OPTIONS, *options]
            code = call.nvrtcCompileProgram(
                program, len(words), (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
            )
            said = self._text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
            log = said.rstrip(b"\0 \n").decode(errors="replace")
            if code:
                raise KernelError(
                    f"NVRTC {self.label} ({self.path}) could not compile {name} for {arch}: "
                    f"{self._error(code)}\n{log[:_MOST_OF_LOG]}\nset VLM_SCAN_BACKEND=chunked to do without, "
                    "and report this with the text above"
                )
            image = self._text("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
        finally:
            call.nvrtcDestroyProgram(ctypes.byref(program))
        matches = {match["name"]: match for match in _ENTRY.finditer(log)}
        shared = {kernel: _SHARED.search(match["rest"]) for kernel, match in matches.items()}
        return Compiled(
            image,
            log,
            footprints(image),
            {kernel: int(match["stores"]) + int(match["loads"]) for kernel, match in matches.items()},
            {kernel: int(found[1]) if found else 0 for kernel, found in shared.items()},
        )

    def _text(self, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, size_of)(program, ctypes.byref(size)), size_of)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, get)(program, buffer), get)
        return buffer.raw

    def _error(self, code: int) -> str:
        return bytes(self._library.nvrtcGetErrorString(code)).decode()

    def _check(self, code: int, what: str) -> None:
        if code:
            raise KernelError(f"NVRTC ({self.path}) failed at {what}: {self._error(code)}; reinstall it")


@functools.cache
def find() -> Nvrtc:
    """Return the library to compile with: ``VLM_NVRTC``, torch's own, a wheel beside torch, or the system's.

    Raises:
        KernelError: There is none; the message says what to install.
    """
    named = os.environ.get(VARIABLE)
    for path in (named,) if named else candidates():
        try:
            return Nvrtc(path)
        except OSError as error:
            if named:
                raise KernelError(
                    f"{VARIABLE} must name NVRTC's library file, got {named!r}: {error}"
                ) from error
    package = _PACKAGES[_majors()[0]]
    raise KernelError(f"NVRTC was not found; pip install {package}, or set {VARIABLE} to its library file")


def candidates() -> Iterator[str]:
    """Yield the libraries that may exist, best first: those whose CUDA version is torch's before others."""
    majors = _majors()
    for major in majors:
        yield from _loaded(major)
    for major in majors:
        yield from (str(path) for path in wheels(major))
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [Path(sys.prefix) / "lib", *(Path(root) / "lib64" for root in (*roots, "/usr/local/cuda"))]
    for major in majors:
        yield f"libnvrtc.so.{major}"
        yield from (str(path) for folder in folders if (path := folder / f"libnvrtc.so.{major}").is_file())


def wheels(major: int) -> list[Path]:
    """Return the libraries of installed wheels of one family, those beside torch first."""
    beside = Path(torch.__file__).resolve().parents[1]
    folders = dict.fromkeys((beside, *(Path(entry) for entry in sys.path if entry)))
    return [path for folder in folders if (path := folder / _WHEELS[major]).is_file()]


def _majors() -> tuple[int, ...]:
    """Return the families in order: a driver that runs this torch loads what torch's own version compiled."""
    ours = int((torch.version.cuda or "0").split(".")[0])
    return tuple(sorted(_WHEELS, key=lambda major: (major != ours, -major)))


def _loaded(major: int) -> Iterator[str]:
    """Yield the path of a library that this process has loaded already."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if f"/libnvrtc.so.{major}" in line)
    yield from (path for path in paths if Path(path).is_file())


def _load_builtins(path: str) -> None:
    """Load the second library of NVRTC, which it would look for on the system's path only."""
    for beside in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if os.sep in path else ():
        ctypes.CDLL(str(beside))
