"""Loads and launches compiled kernels through NVIDIA's driver library, in the context and streams of PyTorch.

Nothing here waits for the GPU. A launch costs the host a few microseconds, and a CUDA graph captures it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator

import torch

from vlm.errors import KernelError
from vlm.ops.cuda import cubin

LIBRARY = "libcuda.so.1"
# numbers of the driver's interface
_CAPABILITY = (75, 76)
_MAX_SHARED_BYTES = 97
_DYNAMIC_SHARED_BYTES = 8
_RELAXED = 2
# what a kernel may have without asking
_FREE_SHARED_BYTES = 48 * 1024

_int, _unsigned, _pointer, _text = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cuInit": (_unsigned,),
    "cuDriverGetVersion": (_pointer,),
    "cuDeviceGet": (_pointer, _int),
    "cuDeviceGetAttribute": (_pointer, _int, _int),
    "cuDevicePrimaryCtxRetain": (_pointer, _int),
    "cuCtxGetCurrent": (_pointer,),
    "cuCtxPushCurrent_v2": (_pointer,),
    "cuCtxPopCurrent_v2": (_pointer,),
    "cuThreadExchangeStreamCaptureMode": (_pointer,),
    "cuModuleLoadData": (_pointer, _text),
    "cuModuleGetFunction": (_pointer, _pointer, _text),
    "cuFuncSetAttribute": (_pointer, _int, _int),
    "cuLaunchKernel": (_pointer, *(7 * (_unsigned,)), _pointer, _pointer, _pointer),
    "cuGetErrorName": (_int, _pointer),
    "cuGetErrorString": (_int, _pointer),
}
# torch's own shortcut: the public way makes a Python object first, which costs as much as the launch
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(index: int) -> int:
    """Return the handle of PyTorch's current stream on a device."""
    if _raw_stream is not None:
        return int(_raw_stream(index))
    return int(torch.cuda.current_stream(index).cuda_stream)


class Driver:
    """The driver library; every failing call becomes a ``KernelError`` with CUDA's name for it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare and initialise ``library``, a ``libcuda``.

        Raises:
            OSError: It is not the driver's library, or one too old.
            KernelError: The driver does not start.
        """
        for name, types in _SIGNATURES.items():
            if not hasattr(library, name):
                raise OSError(f"{LIBRARY} has no {name}")
            getattr(library, name).argtypes = types
        self.call = library
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        self.check(library.cuInit(0), "starting the driver")
        version = _int()
        self.check(library.cuDriverGetVersion(ctypes.byref(version)), "reading the driver's version")
        self.version = (version.value // 1000, version.value % 1000 // 10)

    def check(self, code: int, doing: str) -> None:
        """Raise if ``code`` is an error.

        Raises:
            KernelError: With the error's name and text.
        """
        if not code:
            return
        name, text = _text(), _text()
        self.call.cuGetErrorName(code, ctypes.byref(name))
        self.call.cuGetErrorString(code, ctypes.byref(text))
        said = (name.value or f"CUDA error {code}".encode()).decode()
        raise KernelError(
            f"{doing} failed: {said} ({(text.value or b'no description').decode()}); "
            "VLM_SCAN_BACKEND=chunked does without these kernels"
        )

    def capability(self, index: int) -> tuple[int, int]:
        """Return a device's compute capability."""
        return (self._attribute(index, _CAPABILITY[0]), self._attribute(index, _CAPABILITY[1]))

    def max_shared_bytes(self, index: int) -> int:
        """Return how much shared memory one block can have on a device."""
        return self._attribute(index, _MAX_SHARED_BYTES)

    def context(self, index: int) -> int:
        """Return the device's primary context, which is the one that PyTorch uses."""
        with self._lock:
            if index not in self._contexts:
                context = _pointer()
                code = self.call.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device(index))
                self.check(code, f"opening cuda:{index}")
                self._contexts[index] = int(context.value or 0)
            return self._contexts[index]

    def load(self, image: bytes, entry: str, index: int) -> Kernel:
        """Load a cubin on a device and return one of its kernels.

        Raises:
            KernelError: The driver refuses the image, or it has no such kernel.
        """
        footprint = cubin.footprints(image).get(entry)
        if footprint is None:
            raise KernelError(f"the compiled module has no kernel {entry}; report this")
        context = self.context(index)
        module, function = _pointer(), _pointer()
        with self._inside(context), self._outside_capture():
            self.check(
                self.call.cuModuleLoadData(ctypes.byref(module), image), f"loading {entry} on cuda:{index}"
            )
            code = self.call.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
            self.check(code, f"finding {entry} on cuda:{index}")
            # drivers load lazily, and what is left to the first launch could meet a capture
            if hasattr(self.call, "cuFuncLoad"):
                self.call.cuFuncLoad.argtypes = (_pointer,)
                self.check(self.call.cuFuncLoad(function), f"loading {entry} on cuda:{index}")
        return Kernel(self, entry, index, context, int(function.value or 0), footprint, image)

    def _device(self, index: int) -> int:
        device = _int()
        self.check(self.call.cuDeviceGet(ctypes.byref(device), index), f"finding cuda:{index}")
        return device.value

    def _attribute(self, index: int, number: int) -> int:
        value = _int()
        code = self.call.cuDeviceGetAttribute(ctypes.byref(value), number, self._device(index))
        self.check(code, f"asking cuda:{index}")
        return value.value

    @contextlib.contextmanager
    def _inside(self, context: int) -> Iterator[None]:
        self.check(self.call.cuCtxPushCurrent_v2(context), "entering the GPU's context")
        try:
            yield
        finally:
            self.call.cuCtxPopCurrent_v2(ctypes.byref(_pointer()))

    @contextlib.contextmanager
    def _outside_capture(self) -> Iterator[None]:
        """Let this thread allocate while a stream is captured: loading does not touch the captured stream."""
        mode = _int(_RELAXED)
        self.check(self.call.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "preparing to load")
        try:
            yield
        finally:
            self.call.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class _Slots(threading.local):
    """What a launch writes into, one for each thread: the driver reads it while other threads run."""

    def __init__(self) -> None:
        self.parameters = (ctypes.c_void_p * 1)()
        self.context = ctypes.c_void_p()
        self.context_at = ctypes.byref(self.context)


class Kernel:
    """A kernel of one struct argument, loaded on one device; any thread may launch it.

    Attributes:
        entry: Its name in the source.
        index: The device's.
        footprint: Registers, local memory and the argument's size.
    """

    def __init__(
        self,
        driver: Driver,
        entry: str,
        index: int,
        context: int,
        function: int,
        footprint: cubin.Footprint,
        image: bytes,
    ) -> None:
        self.entry = entry
        self.index = index
        self.footprint = footprint
        self._driver = driver
        self._context = context
        self._function = function
        self._image = image
        self._allowed_shared_bytes = _FREE_SHARED_BYTES
        self._lock = threading.Lock()
        self._slots = _Slots()
        self._launch = driver.call.cuLaunchKernel
        self._get_context = driver.call.cuCtxGetCurrent

    def constant(self, name: str) -> bytes:
        """Return the initial bytes of a variable of the kernel's module, read without touching the GPU.

        Raises:
            KeyError: The module has no such variable.
        """
        return cubin.constant(self._image, name)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        argument: ctypes.Structure,
        stream: int | None = None,
    ) -> None:
        """Queue the kernel. ``argument`` may be changed or freed afterwards; what it points to may not.

        Args:
            grid: Blocks in x, y and z.
            block: Threads in x, y and z.
            shared_bytes: Dynamic shared memory of a block.
            argument: The kernel's only argument; its layout must be the kernel's.
            stream: Handle of a stream of the kernel's device; PyTorch's current one if None.

        Raises:
            ValueError: ``argument`` has another size than the kernel's.
            KernelError: The launch failed, or an earlier one on this device did.
        """
        if ctypes.sizeof(argument) != self.footprint.parameter_bytes:
            raise ValueError(
                f"{self.entry} takes {self.footprint.parameter_bytes} bytes, "
                f"got a {type(argument).__name__} of {ctypes.sizeof(argument)}"
            )
        if shared_bytes > self._allowed_shared_bytes:
            self._allow(shared_bytes)
        if stream is None:
            stream = current_stream(self.index)
        slots = self._slots
        parameters = slots.parameters
        parameters[0] = ctypes.addressof(argument)
        code = self._get_context(slots.context_at)
        if code or slots.context.value != self._context:
            # another device is current, or this thread has not used CUDA yet
            with self._driver._inside(self._context):
                code = self._launch(self._function, *grid, *block, shared_bytes, stream, parameters, None)
        else:
            code = self._launch(self._function, *grid, *block, shared_bytes, stream, parameters, None)
        if code:
            self._driver.check(
                code,
                f"launching {self.entry} on cuda:{self.index} (grid {grid}, block {block}, "
                f"{shared_bytes} bytes of shared memory)",
            )

    def _allow(self, shared_bytes: int) -> None:
        """Ask the driver for more shared memory than a kernel may use otherwise."""
        with self._lock:
            if shared_bytes <= self._allowed_shared_bytes:
                return
            with self._driver._inside(self._context):
                code = self._driver.call.cuFuncSetAttribute(
                    self._function, _DYNAMIC_SHARED_BYTES, shared_bytes
                )
            if code:
                most = self._driver.max_shared_bytes(self.index)
                self._driver.check(
                    code,
                    f"giving {shared_bytes} bytes of shared memory to {self.entry} on cuda:{self.index}, "
                    f"which has {most}",
                )
            self._allowed_shared_bytes = shared_bytes


@functools.cache
def find() -> Driver:
    """Return the driver of this machine.

    Raises:
        KernelError: There is none, or it does not start.
    """
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except OSError as error:
        raise KernelError(f"no GPU driver ({error})") from error
