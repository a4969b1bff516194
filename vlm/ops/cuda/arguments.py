"""What all calls of CUDA kernels share: tensors as arguments, and what a kernel says of itself."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from vlm.ops.cuda.driver import Kernel

# what the kernels call the stored types
STORED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VECTOR_BYTES = 16


@functools.cache
def geometry(kernel: Kernel, name: str) -> tuple[int, ...]:
    """Return the numbers in a kernel's module: threads, shared bytes, and what its header names."""
    content = kernel.constant(name)
    return struct.unpack(f"<{len(content) // 8}q", content)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_gpu(x: Tensor) -> bool:
    """Return whether CUDA kernels may serve ``x``. Asks for no backend, so that a graph can be traced."""
    return x.device.type == "cuda"


def allows_tf32() -> bool:
    """Return whether PyTorch may round factors to tf32 in products of fp32 matrices on CUDA."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def rows(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def parameter(x: Tensor | None) -> Tensor | None:
    """Return a parameter in fp32, contiguous."""
    return None if x is None else x.float().contiguous()


def is_aligned(x: Tensor) -> bool:
    """Return whether every row begins at a multiple of 16 bytes."""
    size, starts = x.element_size(), x.data_ptr()
    for stride, n in zip(x.stride()[:-1], x.shape, strict=False):
        if n > 1:
            starts |= stride * size
    return starts % VECTOR_BYTES == 0
