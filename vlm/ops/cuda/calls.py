"""Calls of the CUDA kernels: tensors in, tensors out. Mirrors ``kernels/cuda/problem.cuh``."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.driver import Kernel
from vlm.ops.cuda.registry import SCAN_SPLITS, SCAN_STATES, scan_forward_kernel
from vlm.ops.selective_scan.reference import Scan, num_checkpoints

_IO = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_VECTOR_BYTES = 16
_LONGEST = 1 << 31
# warps on each multiprocessor below which the time of a scan is split; modelled, not measured yet
_WARPS_WANTED = 10
# a split tile has eight steps for each warp; fewer tiles than this are not worth the exchange
_TILES_WANTED = 4
_STEPS_OF_WARP = 8


class _Direction(ctypes.Structure):
    """``ScanDirection``."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "u",
                "delta",
                "weight",
                "A",
                "B",
                "C",
                "D",
                "bias",
                "initial",
                "last",
                "kept",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "u_batch",
                "u_row",
                "delta_batch",
                "delta_row",
                "bc_batch",
                "bc_row",
                "bc_group",
            )
        ),
    ]


class _ScanForward(ctypes.Structure):
    """``ScanForward``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "length", "channels", "groups", "softplus", "reverse")
        ),
        ("segments", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("z_batch", ctypes.c_int64),
        ("z_row", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("direction", _Direction * 2),
    ]


def serves(s: Scan) -> bool:
    """Return whether the kernels have a form for this scan."""
    u = s.u
    return u.dtype in _IO and s.A.shape[1] in SCAN_STATES and max(u.shape[1], *u.stride()[1:]) < _LONGEST


def scan_forward(s: Scan, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction without gate; results as in ``reference.forward``."""
    batch, length, channels = s.u.shape
    states = s.A.shape[1]
    out = s.u.new_empty(batch, length, channels)
    last = s.A.new_empty(batch, channels, states)
    kept = s.A.new_empty(1, batch, num_checkpoints(length), states, channels) if save else None
    _run([s], None, out, None, last, kept)
    return out, last, s.A.new_empty(0) if kept is None else kept[0]


def bi_scan_forward(scans: list[Scan], z: Tensor, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the directions, add, gate: the gated sum and, if ``save``, the sum and the kept states."""
    u, A = scans[0].u, scans[0].A
    batch, length, channels = u.shape
    out = u.new_empty(batch, length, channels)
    # of half types the first direction leaves its sum there for the second
    total = torch.empty_like(out) if save or (len(scans) == 2 and u.dtype != torch.float32) else None
    kept = None
    if save:
        kept = A.new_empty(len(scans), batch, num_checkpoints(length), A.shape[1], channels)
    _run(scans, z, out, total, None, kept)
    if total is None or kept is None:
        return out, u.new_empty(0), A.new_empty(0)
    return out, total, kept


def _run(
    scans: list[Scan],
    z: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    last: Tensor | None,
    kept: Tensor | None,
) -> None:
    """Describe the problem, choose the kernel and queue it."""
    s = scans[0]
    batch, length, channels = out.shape
    groups = s.B.shape[2]
    problem = _ScanForward(
        batch, length, channels, groups, s.softplus, s.reverse if len(scans) == 1 else False
    )
    alive = [out]  # until the launch is queued: afterwards the allocator keeps the order of the stream
    sequences = [out]

    def address(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        alive.append(tensor)
        return tensor.data_ptr()

    segments = None if s.segments is None else s.segments.contiguous()
    problem.segments, problem.out, problem.total = address(segments), address(out), address(total)
    if z is not None:
        z = _rows(z)
        sequences.append(z)
        problem.z, problem.z_batch, problem.z_row = address(z), z.stride(0), z.stride(1)
    for place, s in enumerate(scans):
        q = problem.direction[place]
        B, C = _rows(s.B), _rows(s.C)
        if B.stride() != C.stride() or not (_is_aligned(B) and _is_aligned(C)):
            # the rows that a projection left may begin anywhere; copies of the narrow B and C cost less than
            # giving up wide loads of everything
            B, C = B.contiguous(), C.contiguous()
        u, delta = _rows(s.u), _rows(s.delta)
        sequences += [u, delta, B, C]
        q.u, q.delta, q.B, q.C = address(u), address(delta), address(B), address(C)
        for name in ("A", "D", "bias", "initial"):
            setattr(q, name, address(_single(getattr(s, name))))
        q.last, q.kept = address(last), address(None if kept is None else kept[place])
        q.u_batch, q.u_row = u.stride(0), u.stride(1)
        q.delta_batch, q.delta_row = delta.stride(0), delta.stride(1)
        q.bc_batch, q.bc_row, q.bc_group = B.stride()[:3]
    aligned = (
        all(map(_is_aligned, sequences)) and channels // groups * out.element_size() % _VECTOR_BYTES == 0
    )
    kernel, tile_grid = _kernel(
        out, s.A.shape[1], len(scans), groups, aligned, segments is not None or kept is not None
    )
    threads, shared_bytes, _, _ = _geometry(kernel)
    kernel.launch((tile_grid, 1, 1), (threads, 1, 1), shared_bytes, problem)


def _kernel(
    out: Tensor, states: int, directions: int, groups: int, aligned: bool, events: bool
) -> tuple[Kernel, int]:
    """Return the kernel that serves, and how many blocks it takes."""
    batch, length, channels = out.shape

    def form(split: int) -> tuple[Kernel, int, int]:
        wanted = scan_forward_kernel(
            _IO[out.dtype], states, directions, aligned=aligned, events=events, split=split
        )
        kernel = cuda_library.kernel(wanted, out.device)
        _, _, tile_channels, slots = _geometry(kernel)
        tiles = groups * -(-(channels // groups) // tile_channels)
        return kernel, batch * -(-tiles // slots), batch * tiles * directions

    kernel, blocks, warps = form(1)
    for split in SCAN_SPLITS[events][1:]:
        is_short = length < _TILES_WANTED * _STEPS_OF_WARP * split
        if is_short or warps >= _WARPS_WANTED * _multiprocessors(out.device):
            break
        kernel, blocks, narrow = form(split)
        warps = narrow * split
    return kernel, blocks


@functools.cache
def _geometry(kernel: Kernel) -> tuple[int, int, int, int]:
    """Return a kernel's threads, shared bytes, channels of a tile, and tiles of a block."""
    numbers: tuple[int, int, int, int] = struct.unpack("<4q", kernel.constant("vlm_scan_forward_geometry"))
    return numbers


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _single(x: Tensor | None) -> Tensor | None:
    """Return a parameter in fp32, contiguous."""
    return None if x is None else x.float().contiguous()


def _is_aligned(x: Tensor) -> bool:
    """Return whether every row begins at a multiple of 16 bytes."""
    size = x.element_size()
    starts = (
        x.data_ptr(),
        *(stride * size for stride, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1),
    )
    return all(start % _VECTOR_BYTES == 0 for start in starts)
