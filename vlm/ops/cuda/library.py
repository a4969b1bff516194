"""Finds, compiles and loads the CUDA kernels: at first use, for the GPU at hand, kept on disk afterwards.

Nothing happens at import. The first use of a kernel on a machine compiles it (about a second); later
processes load it from the user's cache. Without a GPU, a driver or NVRTC the PyTorch implementations serve.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from vlm.assets import asset
from vlm.errors import InvalidInput, KernelError
from vlm.ops import kernel_cache
from vlm.ops.cuda import driver as cuda_driver
from vlm.ops.cuda import nvrtc
from vlm.ops.cuda.registry import INSTANTIATIONS, PROBE, Instantiation

OLDEST_CAPABILITY = (8, 0)
_FOLDER = "kernels/cuda"
_PROBE_SHARED_BYTES = 64 * 1024
_PROBE_ELEMENTS = 1000
_PROBE_THREADS = 128
_PROBE_SEED = 0x5EED
_LOG = logging.getLogger(__name__)


class Compiler(Protocol):
    """What is needed of ``nvrtc.Nvrtc``."""

    @property
    def label(self) -> str:
        """Return the version as text."""
        ...

    def architecture(self, capability: tuple[int, int]) -> str:
        """Return the architecture that serves a GPU."""
        ...

    def compile(
        self, source: str, headers: dict[str, str], options: Sequence[str], arch: str, name: str
    ) -> nvrtc.Compiled:
        """Compile a source."""
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """A compiled module.

    Attributes:
        content: The cubin.
        path: Where it is kept; None if no folder serves, and the next process compiles again.
        is_new: Whether it was compiled now.
    """

    content: bytes
    path: Path | None
    is_new: bool


@dataclass(frozen=True, slots=True)
class Preparation:
    """What making all kernels ready on a device took."""

    num_kernels: int
    num_compiled: int
    seconds: float


class Library:
    """The kernels of this process, on all its devices."""

    def __init__(self, driver: cuda_driver.Driver, compiler: Compiler) -> None:
        self.driver = driver
        self.compiler = compiler
        self._kernels: dict[tuple[Instantiation, int], cuda_driver.Kernel] = {}
        self._reasons: dict[int, str] = {}
        self._lock = threading.RLock()

    def kernel(self, wanted: Instantiation, index: int) -> cuda_driver.Kernel:
        """Return a kernel on a device, compiling and loading it at the first call.

        Raises:
            KernelError: It cannot be compiled or loaded.
        """
        found = self._kernels.get((wanted, index))
        return found if found is not None else self._load(wanted, index)[0]

    def architecture(self, index: int) -> str:
        """Return what to compile for on a device.

        Raises:
            KernelError: The GPU is too old for the kernels, or too new for the compiler.
        """
        capability = self.driver.capability(index)
        if capability < OLDEST_CAPABILITY:
            raise KernelError(
                f"the CUDA kernels need compute capability {_dotted(OLDEST_CAPABILITY)} or later, "
                f"cuda:{index} has {_dotted(capability)}"
            )
        return self.compiler.architecture(capability)

    def prepare(self, index: int, wanted: Sequence[Instantiation] = INSTANTIATIONS) -> Preparation:
        """Make kernels ready on a device, several at a time, so that no later call waits for a compiler."""
        start = time.perf_counter()
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            made = list(pool.map(lambda each: self._load(each, index)[1], wanted))
        return Preparation(len(made), sum(made), time.perf_counter() - start)

    def reason(self, index: int) -> str:
        """Return why the kernels cannot serve on a device, or an empty string; the first call tries them."""
        with self._lock:
            if index not in self._reasons:
                if _is_capturing():
                    # a trial waits for the GPU, which would break the capture; it is made up for afterwards
                    return self._refusal(index)
                self._reasons[index] = self._refusal(index) or self._trial(index)
            return self._reasons[index]

    def _load(self, wanted: Instantiation, index: int) -> tuple[cuda_driver.Kernel, bool]:
        """Return a kernel, and whether it was compiled for this."""
        found = self._kernels.get((wanted, index))
        if found is not None:
            return found, False
        made = image(wanted, self.architecture(index), self.compiler)
        with self._lock:
            # another thread may have loaded it while this one compiled
            found = self._kernels.get((wanted, index))
            if found is None:
                found = self.driver.load(made.content, wanted.entry, index)
                self._kernels[wanted, index] = found
            return found, made.is_new

    def _refusal(self, index: int) -> str:
        try:
            self.architecture(index)
        except KernelError as error:
            return str(error)
        return ""

    def _trial(self, index: int) -> str:
        """Return what went wrong when the probe ran, or an empty string."""
        try:
            kernel = self.kernel(PROBE, index)
            out = torch.zeros(_PROBE_ELEMENTS, dtype=torch.int32, device=torch.device("cuda", index))
            run_probe(kernel, out)
            found = out.tolist()
        except (KernelError, InvalidInput, RuntimeError) as error:
            return f"a trial on cuda:{index} failed: {error}"
        if found != probe_pattern():
            return f"a trial on cuda:{index} gave wrong numbers"
        return ""


class ProbeArgument(ctypes.Structure):
    """The argument of ``kernels/cuda/probe.cu``."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_longlong),
        ("seed", ctypes.c_uint),
        ("last", ctypes.c_int),
    )


def run_probe(kernel: cuda_driver.Kernel, out: torch.Tensor) -> None:
    """Queue the probe, which fills ``out`` (int32) with ``probe_pattern``."""
    argument = ProbeArgument(out.data_ptr(), out.numel(), _PROBE_SEED, _PROBE_SHARED_BYTES // 4 - 1)
    blocks = -(-out.numel() // _PROBE_THREADS)
    kernel.launch((blocks, 1, 1), (_PROBE_THREADS, 1, 1), _PROBE_SHARED_BYTES, argument)


def probe_pattern(count: int = _PROBE_ELEMENTS) -> list[int]:
    """Return what the probe writes, as signed numbers."""
    words = ((index * 2654435761 & 0xFFFFFFFF) ^ _PROBE_SEED for index in range(count))
    return [word - (1 << 32) if word >> 31 else word for word in words]


def available(device: torch.device | str | int) -> bool:
    """Return whether the CUDA kernels can serve tensors on ``device``; the first call may take a second."""
    return not unavailable_reason(device)


def unavailable_reason(device: torch.device | str | int) -> str:
    """Return why ``available`` is false, or an empty string."""
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if place.type != "cuda":
        return f"they need a CUDA device, got {place}"
    found = _found()
    return found if isinstance(found, str) else found.reason(_index(place))


def kernel(wanted: Instantiation, device: torch.device | int) -> cuda_driver.Kernel:
    """Return a kernel on a device, compiling and loading it at the first call.

    Raises:
        KernelError: It cannot be had; the message says why.
    """
    return library().kernel(wanted, device if isinstance(device, int) else _index(device))


def library() -> Library:
    """Return the kernels of this process.

    Raises:
        KernelError: There is no GPU that answers, no driver or no compiler.
    """
    found = _found()
    if isinstance(found, str):
        raise KernelError(f"the CUDA kernels are not available: {found}; use VLM_SCAN_BACKEND=chunked")
    return found


def describe() -> list[str]:
    """Return what is there to compile and launch with, and where the results are kept, each as a phrase."""
    phrases = []
    try:
        phrases.append(f"driver for CUDA {_dotted(cuda_driver.find().version)}")
    except KernelError:
        phrases.append(f"no driver ({cuda_driver.LIBRARY})")
    try:
        compiler = nvrtc.find()
        phrases.append(f"NVRTC {compiler.label} from {compiler.path}")
    except KernelError as error:
        phrases.append(str(error) if os.environ.get(nvrtc.VARIABLE) else "no NVRTC")
    try:
        phrases.append(f"compiled kernels are kept in {kernel_cache.folder()}")
    except kernel_cache.NoCacheFolder as error:
        phrases.append(str(error))
    return phrases


def image(wanted: Instantiation, arch: str, compiler: Compiler) -> Image:
    """Return a compiled kernel from the cache, compiling it first if it is missing or damaged. Needs no GPU.

    Raises:
        KernelError: It does not compile.
    """
    source, headers = sources(wanted.source)
    parts = [wanted.source, source, *(text for pair in sorted(headers.items()) for text in pair)]
    parts += [*nvrtc.OPTIONS, *wanted.options, arch, compiler.label]
    key = kernel_cache.key(*(part.encode() for part in parts))
    made: list[bytes] = []

    def build(work: Path) -> Path:
        _LOG.info("compiling %s for %s (once)", wanted, arch)
        made.append(compiler.compile(source, headers, wanted.options, arch, wanted.source).cubin)
        (work / "image").write_bytes(made[0])
        return work / "image"

    try:
        target = kernel_cache.folder() / f"{Path(wanted.source).stem}-{arch}-{key}.cubin"
        return Image(kernel_cache.entry(target, build), target, bool(made))
    except (kernel_cache.NoCacheFolder, OSError) as error:
        _LOG.warning("compiled kernels cannot be kept, so every process compiles them again: %s", error)
    if not made:
        made.append(compiler.compile(source, headers, wanted.options, arch, wanted.source).cubin)
    return Image(made[0], None, is_new=True)


@functools.cache
def sources(name: str) -> tuple[str, dict[str, str]]:
    """Return the text of a source file and of all headers beside it.

    Raises:
        InvalidInput: The installation lacks them.
    """
    folder = asset(_FOLDER)
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}
    return asset(f"{_FOLDER}/{name}").read_text(encoding="utf-8"), headers


@functools.cache
def _found() -> Library | str:
    """Return the kernels, or the reason why there are none."""
    if not torch.cuda.is_available():
        return "no GPU answers"
    try:
        asset(_FOLDER)
        return Library(cuda_driver.find(), nvrtc.find())
    except InvalidInput as error:
        _LOG.info("no CUDA kernels: %s", error)
        return str(error)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
