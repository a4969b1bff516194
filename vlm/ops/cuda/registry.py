"""Every CUDA kernel that this package may launch: CI compiles each one and holds it to its limits."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instantiation:
    """One compilation of a source file: a kernel for one kind of problem.

    Attributes:
        source: File in ``kernels/cuda``.
        entry: Name of the kernel, which has C linkage and takes one struct.
        defines: Macros and their values.
        max_registers: More in a thread mean that fewer warps fit than the kernel was designed for.
        max_spill_bytes: What a thread may put out to local memory, stores and loads together.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, str | int], ...] = ()
    max_registers: int = 255
    max_spill_bytes: int = 0

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)

    def __str__(self) -> str:
        """Name the kernel and what it was compiled for."""
        values = ", ".join(f"{name.removeprefix('VLM_').lower()} {value}" for name, value in self.defines)
        return f"{self.entry} ({values})" if values else self.entry


PROBE = Instantiation("probe.cu", "vlm_probe", max_registers=32)

SCAN_STATES = (8, 16, 32, 64)
# columns of rank rows that a scan multiplies by itself
SCAN_RANKS = (16, 32, 48)
# over how many warps the time of a scan may be split, without and with events
SCAN_SPLITS = {False: (1, 2, 4), True: (1, 4)}
_SCAN_REGISTERS = 128
# the widest rows of fp32 leave shared memory for eight warps only, which find more registers
_WIDE_SCAN_REGISTERS = 168
_SUM_REGISTERS = 40
_SPLIT_SPILL_BYTES = 64
# three blocks on a multiprocessor; all others have room for four
_WIDE_CONV_REGISTERS, _CONV_REGISTERS = 168, 128
_NORM_FORWARD_REGISTERS, _NORM_BACKWARD_REGISTERS = 48, 128


def _scan_defines(
    io: str,
    states: int,
    directions: int,
    *,
    aligned: bool,
    events: bool,
    rank: int = 0,
    split: int = 1,
) -> tuple[tuple[str, str | int], ...]:
    return (
        ("VLM_IO", io),
        ("VLM_STATES", states),
        ("VLM_DIRECTIONS", directions),
        ("VLM_RANK", rank),
        ("VLM_ALIGNED", int(aligned)),
        ("VLM_EVENTS", int(events)),
        ("VLM_SPLIT", split),
    )


@functools.cache
def scan_forward_kernel(
    io: str,
    states: int,
    directions: int,
    *,
    aligned: bool,
    events: bool,
    rank: int = 0,
    split: int = 1,
    polynomial: int = 0,
) -> Instantiation:
    """Return the forward scan for one kind of problem; the macros are explained in ``problem.cuh``."""
    defines = _scan_defines(io, states, directions, aligned=aligned, events=events, rank=rank, split=split)
    if polynomial:
        defines += (("VLM_POLYNOMIAL", polynomial),)
    if split == 1:
        most = _WIDE_SCAN_REGISTERS if (io, rank) == ("fp32", SCAN_RANKS[-1]) else _SCAN_REGISTERS
        return Instantiation("scan_forward.cu", "vlm_scan_forward", defines, max_registers=most)
    # a lane of a split scan keeps a tile's decays; compiled for sm_100 that is a few registers too many
    return Instantiation("scan_forward.cu", "vlm_scan_forward", defines, max_spill_bytes=_SPLIT_SPILL_BYTES)


@functools.cache
def scan_backward_kernel(
    io: str, states: int, directions: int, *, aligned: bool, events: bool, rank: int = 0
) -> Instantiation:
    """Return the backward scan for one kind of problem."""
    defines = _scan_defines(io, states, directions, aligned=aligned, events=events, rank=rank)
    return Instantiation("scan_backward.cu", "vlm_scan_backward", defines)


@functools.cache
def scan_backward_carry_kernel(
    io: str, states: int, directions: int, *, aligned: bool, events: bool, rank: int = 0
) -> Instantiation:
    """Return what finds the gradients that flow back over the borders of spans of time."""
    defines = _scan_defines(io, states, directions, aligned=aligned, events=events, rank=rank)
    return Instantiation("scan_backward.cu", "vlm_scan_backward_carry", defines)


@functools.cache
def sum_kernel(io: str) -> Instantiation:
    """Return the sum of parts; of the macros only the stored type matters to it."""
    defines = _scan_defines(io, 16, 1, aligned=False, events=False)
    return Instantiation("sum.cu", "vlm_sum", defines, max_registers=_SUM_REGISTERS)


def _scan_kernels(io: str, rank: int) -> tuple[Instantiation, ...]:
    """Return what two directions of VideoMamba's scan run, forward and backward."""
    forward = (
        scan_forward_kernel(io, 16, 2, aligned=True, events=events, rank=rank, split=split)
        for events, splits in SCAN_SPLITS.items()
        for split in splits
    )
    backward = (
        kernel(io, 16, 2, aligned=True, events=events, rank=rank)
        for kernel in (scan_backward_kernel, scan_backward_carry_kernel)
        # with segments only where those of other ranks tell nothing new
        for events in ((False, True) if rank in (0, SCAN_RANKS[0]) else (False,))
    )
    return *forward, *backward


CONV_TAPS = (2, 3, 4)


def conv_forward_kernel(
    io: str, taps: int, directions: int, *, aligned: bool, segments: bool
) -> Instantiation:
    """Return the forward convolution for one kind of problem; ``conv_problem.cuh`` explains the macros."""
    return _conv_kernel("forward", io, taps, directions, aligned, segments)


def conv_backward_kernel(
    io: str, taps: int, directions: int, *, aligned: bool, segments: bool
) -> Instantiation:
    """Return the backward convolution for one kind of problem; ``conv_problem.cuh`` explains the macros."""
    return _conv_kernel("backward", io, taps, directions, aligned, segments)


@functools.cache
def _conv_kernel(
    which: str, io: str, taps: int, directions: int, aligned: bool, segments: bool
) -> Instantiation:
    defines = (
        ("VLM_IO", io),
        ("VLM_TAPS", taps),
        ("VLM_DIRECTIONS", directions),
        ("VLM_ALIGNED", int(aligned)),
        ("VLM_SEGMENTS", int(segments)),
    )
    most = _WIDE_CONV_REGISTERS if which == "forward" and io != "fp32" else _CONV_REGISTERS
    return Instantiation(f"conv_{which}.cu", f"vlm_conv_{which}", defines, max_registers=most)


# of 128 elements, that a row may have and still stay in registers; 0 is any number, read twice
NORM_PIECES = (1, 2, 3, 4, 5, 6, 7, 8)


def norm_forward_kernel(io: str, pieces: int, *, aligned: bool) -> Instantiation:
    """Return the forward norm for one kind of problem; the macros are explained in ``norm_problem.cuh``."""
    return _norm_kernel("vlm_norm_forward", io, pieces, aligned, _NORM_FORWARD_REGISTERS)


def norm_backward_kernel(io: str, pieces: int, *, aligned: bool) -> Instantiation:
    """Return the backward norm for one kind of problem; the macros are explained in ``norm_problem.cuh``."""
    return _norm_kernel("vlm_norm_backward", io, pieces, aligned, _NORM_BACKWARD_REGISTERS)


@functools.cache
def _norm_kernel(entry: str, io: str, pieces: int, aligned: bool, most: int) -> Instantiation:
    defines = (("VLM_IO", io), ("VLM_PIECES", pieces), ("VLM_ALIGNED", int(aligned)))
    return Instantiation("norm.cu", entry, defines, max_registers=most)


# what VideoMamba runs in fp32 where PyTorch may multiply in tf32; compiled when they come
TF32_INSTANTIATIONS = tuple(kernel for rank in SCAN_RANKS for kernel in _scan_kernels("fp32", rank))

# what VideoMamba runs; other kinds of problem are compiled when they come
INSTANTIATIONS: tuple[Instantiation, ...] = (
    PROBE,
    *(kernel for io in ("fp32", "bf16", "fp16") for kernel in _scan_kernels(io, 0)),
    *(kernel for rank in SCAN_RANKS for kernel in _scan_kernels("bf16", rank)),
    # the code of the other half type differs in conversions only
    *_scan_kernels("fp16", SCAN_RANKS[0]),
    *(scan_forward_kernel("fp32", 16, 1, aligned=aligned, events=True) for aligned in (False, True)),
    *(scan_backward_kernel("fp32", 16, 1, aligned=aligned, events=True) for aligned in (False, True)),
    *(sum_kernel(io) for io in ("fp32", "bf16", "fp16")),
    *(
        conv_kernel(io, 4, 2, aligned=True, segments=segments)
        for conv_kernel in (conv_forward_kernel, conv_backward_kernel)
        for io in ("fp32", "bf16", "fp16")
        for segments in (False, True)
    ),
    *(
        norm_kernel(io, pieces, aligned=True)
        for norm_kernel in (norm_forward_kernel, norm_backward_kernel)
        for io in ("fp32", "bf16", "fp16")
        for pieces in (2, 3, 5)
    ),
)
