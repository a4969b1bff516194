"""Calls of the scan kernels: tensors in, tensors out. Mirrors ``kernels/cuda/problem.cuh``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.arguments import STORED, VECTOR_BYTES, geometry, is_aligned, parameter, rows
from vlm.ops.cuda.driver import Kernel
from vlm.ops.cuda.registry import SCAN_RANKS, SCAN_SPLITS, SCAN_STATES, scan_forward_kernel
from vlm.ops.selective_scan.reference import Scan, num_checkpoints

_GEOMETRY = "vlm_scan_forward_geometry"
_LONGEST = 1 << 31
# warps on each multiprocessor below which the time of a scan is split; modelled, not measured yet
_WARPS_WANTED = 10
# a split tile has eight steps for each warp; fewer tiles than this are not worth the exchange
_TILES_WANTED = 4
_STEPS_OF_WARP = 8
# of the 16 exponentials that a lane needs for a step, those that an unsplit scan leaves to a polynomial: more
# than none pays where the unit for exponentials is what bounds it. Not measured yet
POLYNOMIAL = 0


class Direction(ctypes.Structure):
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
        ("direction", Direction * 2),
    ]


def takes_rank_rows(scans: list[Scan], weights: list[Tensor], *sequences: Tensor) -> bool:
    """Return whether the kernels multiply these scans' ``delta`` (b, l, r) by ``weights`` (e, r) themselves.

    Of fp32 they do it in tf32, so only where PyTorch's own product would.

    Args:
        scans: One or two directions that the kernels serve.
        weights: One for each of them, contiguous, of the sequences' dtype.
        sequences: What else the problem reads.
    """
    u = scans[0].u
    group_channels = u.shape[2] // scans[0].B.shape[2]
    ranks = {weight.shape[1] for weight in weights} | {s.delta.shape[2] for s in scans}
    return (
        (u.dtype != torch.float32 or cuda_arguments.allows_tf32())
        and len(ranks) == 1
        and ranks <= set(SCAN_RANKS)
        and group_channels * u.element_size() % VECTOR_BYTES == 0
        and all(is_aligned(rows(x)) for x in (*sequences, *(x for s in scans for x in (s.u, s.delta))))
    )


class Addresses:
    """What a problem points at; keeps the tensors alive until the launch is queued.

    Afterwards the allocator keeps the order of the stream.
    """

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._sequences: list[Tensor] = []

    def of(self, x: Tensor | None) -> int | None:
        """Return where a tensor lies."""
        if x is None:
            return None
        self._alive.append(x)
        return x.data_ptr()

    def of_sequence(self, x: Tensor | None) -> int | None:
        """Return where a sequence lies, whose rows are then asked to be aligned."""
        if x is not None:
            self._sequences.append(x)
        return self.of(x)

    def gate(self, problem: ctypes.Structure, z: Tensor | None) -> None:
        """Let a problem point at its gate."""
        if z is not None:
            z = rows(z)
            problem.z, problem.z_batch, problem.z_row = self.of_sequence(z), z.stride(0), z.stride(1)

    def direction(self, q: Direction, s: Scan, weight: Tensor | None) -> None:
        """Let a direction point at its inputs, except ``initial``."""
        q.weight = self.of(weight)
        B, C = rows(s.B), rows(s.C)
        if B.stride() != C.stride() or not (is_aligned(B) and is_aligned(C)):
            # the rows that a projection left may begin anywhere; copies of the narrow B and C cost less than
            # giving up wide loads of everything
            B, C = B.contiguous(), C.contiguous()
        u, delta = rows(s.u), rows(s.delta)
        for name, sequence in (("u", u), ("delta", delta), ("B", B), ("C", C)):
            setattr(q, name, self.of_sequence(sequence))
        for name in ("A", "D", "bias"):
            setattr(q, name, self.of(parameter(getattr(s, name))))
        q.u_batch, q.u_row = u.stride(0), u.stride(1)
        q.delta_batch, q.delta_row = delta.stride(0), delta.stride(1)
        q.bc_batch, q.bc_row, q.bc_group = B.stride()[:3]

    def are_aligned(self, group_channels: int) -> bool:
        """Return whether every row, and every group's first channel, begins at a multiple of 16 bytes."""
        size = self._sequences[0].element_size()
        return group_channels * size % VECTOR_BYTES == 0 and all(map(is_aligned, self._sequences))


def serves(s: Scan) -> bool:
    """Return whether the kernels have a form for this scan."""
    u = s.u
    return u.dtype in STORED and s.A.shape[1] in SCAN_STATES and max(u.shape[1], *u.stride()[1:]) < _LONGEST


def scan_forward(s: Scan, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction without gate; results as in ``reference.forward``."""
    batch, length, channels = s.u.shape
    states = s.A.shape[1]
    out = s.u.new_empty(batch, length, channels)
    last = s.A.new_empty(batch, channels, states)
    kept = s.A.new_empty(1, batch, num_checkpoints(length), states, channels) if save else None
    _run([s], None, [], out, None, last, kept)
    return out, last, s.A.new_empty(0) if kept is None else kept[0]


def bi_scan_forward(
    scans: list[Scan], z: Tensor, weights: list[Tensor], *, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the directions, add, gate: the gated sum and, if ``save``, the sum and the kept states.

    With ``weights`` each scan's ``delta`` is rank rows (b, l, r), and delta = rows @ weight^T; see
    ``takes_rank_rows``.
    """
    u, A = scans[0].u, scans[0].A
    batch, length, channels = u.shape
    out = u.new_empty(batch, length, channels)
    # of half types the first direction leaves its sum there for the second
    total = torch.empty_like(out) if save or (len(scans) == 2 and u.dtype != torch.float32) else None
    kept = None
    if save:
        kept = A.new_empty(len(scans), batch, num_checkpoints(length), A.shape[1], channels)
    _run(scans, z, weights, out, total, None, kept)
    if total is None or kept is None:
        return out, u.new_empty(0), A.new_empty(0)
    return out, total, kept


def _run(
    scans: list[Scan],
    z: Tensor | None,
    weights: list[Tensor],
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
    addresses = Addresses()
    segments = None if s.segments is None else s.segments.contiguous()
    problem.segments, problem.total = addresses.of(segments), addresses.of(total)
    problem.out = addresses.of_sequence(out)
    addresses.gate(problem, z)
    for place, (q, s) in enumerate(zip(problem.direction, scans, strict=False)):
        addresses.direction(q, s, weights[place] if weights else None)
        q.initial, q.last = addresses.of(parameter(s.initial)), addresses.of(last)
        q.kept = addresses.of(None if kept is None else kept[place])
    aligned = addresses.are_aligned(channels // groups)
    events = segments is not None or kept is not None
    rank = weights[0].shape[1] if weights else 0
    kernel, blocks = _kernel(out, s.A.shape[1], len(scans), groups, aligned, events, rank)
    threads, shared_bytes, _, _ = geometry(kernel, _GEOMETRY)
    kernel.launch((blocks, 1, 1), (threads, 1, 1), shared_bytes, problem)


def _kernel(
    out: Tensor, states: int, directions: int, groups: int, aligned: bool, events: bool, rank: int
) -> tuple[Kernel, int]:
    """Return the kernel that serves, and how many blocks it takes."""
    batch, length, channels = out.shape

    def form(split: int) -> tuple[Kernel, int, int]:
        wanted = scan_forward_kernel(
            STORED[out.dtype],
            states,
            directions,
            aligned=aligned,
            events=events,
            rank=rank,
            split=split,
            polynomial=POLYNOMIAL if split == 1 else 0,
        )
        kernel = cuda_library.kernel(wanted, out.device)
        _, _, tile_channels, slots = geometry(kernel, _GEOMETRY)
        tiles = groups * -(-(channels // groups) // tile_channels)
        return kernel, batch * -(-tiles // slots), batch * tiles * directions

    kernel, blocks, warps = form(1)
    for split in SCAN_SPLITS[events][1:]:
        is_short = length < _TILES_WANTED * _STEPS_OF_WARP * split
        if is_short or warps >= _WARPS_WANTED * cuda_arguments.multiprocessors(out.device):
            break
        kernel, blocks, narrow = form(split)
        warps = narrow * split
    return kernel, blocks
