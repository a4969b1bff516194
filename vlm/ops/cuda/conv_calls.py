"""Calls of the convolution kernels: tensors in, tensors out. Mirrors ``kernels/cuda/conv_problem.cuh``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.arguments import STORED, VECTOR_BYTES, geometry, is_aligned, parameter, rows
from vlm.ops.cuda.driver import Kernel
from vlm.ops.cuda.registry import CONV_TAPS, Instantiation, conv_backward_kernel, conv_forward_kernel

_LONGEST = 1 << 31
# steps that a walker takes in at a time: it walks whole tiles of them
_TILE = 8
_MOST_TILES = 64
# what a walker waits for its first rows, in tiles; modelled, not measured yet
_START = 1
# blocks that a multiprocessor has at a time, as the kernels' launch bounds promise
_FORWARD_BLOCKS, _BACKWARD_BLOCKS = 3, 4


class _Sequence(ctypes.Structure):
    """``ConvSequence``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "stretch", "x_batch", "x_row")),
    )


class _Filter(ctypes.Structure):
    """``ConvFilter``."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Forward(ctypes.Structure):
    """``ConvForward``."""

    _fields_ = (("sequence", _Sequence), ("filter", _Filter * 2), ("out", ctypes.c_void_p * 2))


class _Backward(ctypes.Structure):
    """``ConvBackward``."""

    _fields_ = (
        ("sequence", _Sequence),
        ("filter", _Filter * 2),
        ("du", ctypes.c_void_p * 2),
        ("du_batch", ctypes.c_int64 * 2),
        ("du_row", ctypes.c_int64 * 2),
        ("dx", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


class _Given(NamedTuple):
    """The arguments of both passes, as the kernels take them; parameters by direction."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    segments: Tensor | None


class _Form(NamedTuple):
    """A kernel and how it is launched."""

    kernel: Kernel
    stretch: int
    blocks: int
    threads: int
    shared_bytes: int

    def launch(self, problem: ctypes.Structure) -> None:
        """Queue the kernel."""
        self.kernel.launch((self.blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes, problem)


def serves(x: Tensor, taps: int) -> bool:
    """Return whether the kernels have a form for this convolution."""
    return x.dtype in STORED and taps in CONV_TAPS and max(x.shape[1:]) < _LONGEST


def conv2_forward(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return both directions' outputs; the second is empty without ``weight_b``."""
    given = _given(x, weight_f, bias_f, weight_b, bias_b, segments)
    # not the halves of one buffer: what an operator returns may not share memory
    outputs = [x.new_empty(x.shape) for _ in given.weights]
    overlap = len(outputs) * (weight_f.shape[1] - 1)
    form = _form(conv_forward_kernel, "vlm_conv_forward", _FORWARD_BLOCKS, given, outputs, overlap)
    problem = _Forward(*_described(given, form.stretch))
    for place, out in enumerate(outputs):
        problem.out[place] = out.data_ptr()
    form.launch(problem)
    return outputs[0], outputs[1] if len(outputs) == 2 else x.new_empty(0)


def conv2_backward(
    du_f: Tensor | None,
    du_b: Tensor | None,
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> list[Tensor | None]:
    """Return dx in x's dtype, and dweight_f, dbias_f, dweight_b, dbias_b in fp32; None for what is None."""
    given = _given(x, weight_f, bias_f, weight_b, bias_b, segments)
    directions, taps = len(given.weights), weight_f.shape[1]
    dx = x.new_empty(x.shape)
    du = [
        torch.zeros_like(dx) if part is None else _strided(part.to(x.dtype))
        for part in (du_f, du_b)[:directions]
    ]
    form = _form(
        conv_backward_kernel, "vlm_conv_backward", _BACKWARD_BLOCKS, given, [dx, *du], 2 * (taps - 1)
    )
    batch, length, channels = x.shape
    stretches = -(-length // form.stretch)
    parts = dx.new_empty(batch * stretches, directions, taps + 1, channels, dtype=torch.float32)
    problem = _Backward(*_described(given, form.stretch))
    problem.dx, problem.sums = dx.data_ptr(), parts.data_ptr()
    for place, part in enumerate(du):
        problem.du[place] = part.data_ptr()
        problem.du_batch[place], problem.du_row[place] = part.stride(0), part.stride(1)
    form.launch(problem)
    gradients: list[Tensor | None] = [dx]
    sums = parts.sum(0)
    for place, bias in enumerate(given.biases):
        # copies: what an operator returns may not share memory
        gradients.append(sums[place, :taps].t().clone(memory_format=torch.contiguous_format))
        gradients.append(None if bias is None else sums[place, taps].clone())
    return gradients + [None] * (5 - len(gradients))


def _given(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    segments: Tensor | None,
) -> _Given:
    """Return the arguments as the kernels take them."""
    given = _Given(_strided(x), [], [], None if segments is None else segments.contiguous())
    for weight, bias in ((weight_f, bias_f), (weight_b, bias_b)):
        if weight is not None:
            given.weights.append(weight.float().contiguous())
            given.biases.append(parameter(bias))
    return given


def _strided(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous channels and rows that a 32-bit stride reaches."""
    x = rows(x)
    return x if x.stride(1) < _LONGEST else x.contiguous()


def _described(given: _Given, stretch: int) -> tuple[_Sequence, ctypes.Array[_Filter]]:
    """Return the first two fields of both problems. ``given`` must live until the launch is queued."""
    x, segments = given.x, given.segments
    address = None if segments is None else segments.data_ptr()
    sequence = _Sequence(x.data_ptr(), address, *x.shape, stretch, x.stride(0), x.stride(1))
    filters = (_Filter * 2)()
    for place, (weight, bias) in enumerate(zip(given.weights, given.biases, strict=True)):
        filters[place] = _Filter(weight.data_ptr(), None if bias is None else bias.data_ptr())
    return sequence, filters


def _form(
    wanted: Callable[..., Instantiation],
    name: str,
    blocks: int,
    given: _Given,
    others: list[Tensor],
    overlap: int,
) -> _Form:
    """Return the kernel that serves, and how it shares the work.

    Args:
        wanted: The registry's choice of kernels.
        name: What they are called in their source.
        blocks: Blocks that a multiprocessor has at a time.
        given: The problem.
        others: Its other sequences.
        overlap: Steps that a walker walks more than it answers for.
    """
    x = given.x
    batch, length, channels = x.shape
    parameters = [*given.weights, *(bias for bias in given.biases if bias is not None)]
    is_wide = channels * x.element_size() % VECTOR_BYTES == 0
    instantiation = wanted(
        STORED[x.dtype],
        given.weights[0].shape[1],
        len(given.weights),
        aligned=is_wide and all(map(is_aligned, (x, *others, *parameters))),
        segments=given.segments is not None,
    )
    kernel = cuda_library.kernel(instantiation, x.device)
    threads, shared_bytes, tile_channels, slots = geometry(kernel, f"{name}_geometry")
    columns = batch * -(-channels // tile_channels)
    at_once = cuda_arguments.multiprocessors(x.device) * blocks * slots
    stretch = _stretch(length, overlap, columns, at_once)
    walkers = columns * -(-length // stretch)
    return _Form(kernel, stretch, -(-walkers // slots), threads, shared_bytes)


@functools.lru_cache(maxsize=4096)
def _stretch(length: int, overlap: int, columns: int, at_once: int) -> int:
    """Return over how many steps a walker walks.

    Args:
        length: Steps of the sequence.
        overlap: Steps that a walker walks more than it answers for.
        columns: Walkers for each stretch of time.
        at_once: Walkers that the GPU has at a time.
    """
    whole = min(-(-(length + overlap) // _TILE), _MOST_TILES)

    def cost(tiles: int) -> int:
        walkers = columns * -(-length // (tiles * _TILE - overlap))
        return -(-walkers // at_once) * (tiles + _START)

    # the overlap is less than a tile
    tiles = min(range(1, whole + 1), key=cost)
    return min(length, tiles * _TILE - overlap)
