"""Calls of the norm kernels: tensors in, tensors out. Mirrors ``kernels/cuda/norm_problem.cuh``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.arguments import STORED, VECTOR_BYTES, geometry, is_aligned, rows
from vlm.ops.cuda.driver import Kernel
from vlm.ops.cuda.registry import NORM_PIECES, Instantiation, norm_backward_kernel, norm_forward_kernel

_GEOMETRY = "vlm_norm_geometry"
_PIECE = 128
_LONGEST = 1 << 31
# blocks of the backward pass for each multiprocessor, where there are rows enough; modelled, not measured yet
_BLOCKS = 8


class _Forward(ctypes.Structure):
    """``NormForward``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "out", "stream")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "x_row")),
        ("eps", ctypes.c_float),
    )


class _Backward(ctypes.Structure):
    """``NormBackward``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("stream", "dout", "dstream", "weight", "dx", "dresidual", "sums")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "width", "dout_row", "block_rows")),
        ("eps", ctypes.c_float),
    )


def serves(x: Tensor) -> bool:
    """Return whether the kernels have a form for rows like those of ``x``."""
    return x.dtype in STORED and x.numel() > 0 and x.shape[-1] < _LONGEST


def add_rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + residual`` in the dtype of ``x``, and the sum in fp32."""
    flat, weight = _rows(x), weight.float().contiguous()
    residual = None if residual is None else residual.float().contiguous()
    out, stream = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
    kernel = _kernel(norm_forward_kernel, flat, weight, out, stream, residual)
    threads, _, warps, _, _ = geometry(kernel, _GEOMETRY)
    count, width = flat.shape
    problem = _Forward(
        flat.data_ptr(),
        _address(residual),
        weight.data_ptr(),
        out.data_ptr(),
        stream.data_ptr(),
        count,
        width,
        flat.stride(0),
        eps,
    )
    kernel.launch((-(-count // warps), 1, 1), (threads, 1, 1), 0, problem)
    return out, stream


def add_rms_norm_backward(
    dout: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, eps: float, *, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum's gradient in the dtype of ``dout``; if ``both``, in fp32; the weight's in fp32."""
    flat, weight = _rows(dout), weight.float().contiguous()
    stream = stream.contiguous()
    dstream = None if dstream is None else dstream.float().contiguous()
    dx = dout.new_empty(dout.shape)
    wide = stream.new_empty(stream.shape if both else 0)
    kernel = _kernel(norm_backward_kernel, flat, weight, stream, dstream, dx, wide)
    threads, shared_bytes, warps, _, most_rows = geometry(kernel, _GEOMETRY)
    count, width = flat.shape
    wanted = cuda_arguments.multiprocessors(dout.device) * _BLOCKS
    # every warp has as many rows as the others
    block_rows = min(-(-count // (wanted * warps)) * warps, most_rows)
    blocks = -(-count // block_rows)
    parts = stream.new_empty(blocks, width)
    problem = _Backward(
        stream.data_ptr(),
        flat.data_ptr(),
        _address(dstream),
        weight.data_ptr(),
        dx.data_ptr(),
        wide.data_ptr() if both else None,
        parts.data_ptr(),
        count,
        width,
        flat.stride(0),
        block_rows,
        eps,
    )
    kernel.launch((blocks, 1, 1), (threads, 1, 1), shared_bytes, problem)
    return dx, wide, parts.sum(0)


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` as (rows, width)."""
    return rows(x.reshape(-1, x.shape[-1]))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _kernel(wanted: Callable[..., Instantiation], flat: Tensor, *others: Tensor | None) -> Kernel:
    """Return the kernel that serves rows like those of ``flat``, beside its ``others``."""
    width = flat.shape[1]
    pieces = -(-width // _PIECE)
    is_wide = width * flat.element_size() % VECTOR_BYTES == 0
    given = [flat, *(each for each in others if each is not None)]
    instantiation = wanted(
        STORED[flat.dtype],
        pieces if pieces in NORM_PIECES else 0,
        aligned=is_wide and all(map(is_aligned, given)),
    )
    return cuda_library.kernel(instantiation, flat.device)
