"""Calls of the scan's backward kernels: tensors in, gradients out. Mirrors ``kernels/cuda/problem.cuh``.

Whatever has to be added up over channel tiles, batch rows or spans of time comes from the kernel in parts; a
second launch adds them in their order. Nothing waits for the GPU, and results repeat to the bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.arguments import STORED, geometry
from vlm.ops.cuda.registry import scan_backward_carry_kernel, scan_backward_kernel, sum_kernel
from vlm.ops.cuda.scan_calls import Addresses, Direction
from vlm.ops.selective_scan.reference import Scan, ScanGradients, num_checkpoints

_GEOMETRY = "vlm_scan_backward_geometry"
_SUM_THREADS, _MOST_SUMS = 256, 8
# as many warps as the kernel leaves registers for on a multiprocessor. Spans beyond that would only wait, and
# a second span already costs a launch that finds what flows over the border; modelled, not measured yet
_WARPS_WANTED = 8


class _BackwardDirection(ctypes.Structure):
    """``ScanBackwardDirection``."""

    _fields_ = [
        ("given", Direction),
        *(
            (name, ctypes.c_void_p)
            for name in ("du", "ddelta", "dA", "dD", "dbias", "dinitial", "dBC", "carry")
        ),
    ]


class _ScanBackward(ctypes.Structure):
    """``ScanBackward``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "length", "channels", "groups", "softplus", "reverse", "spans")
        ),
        ("segments", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("z_batch", ctypes.c_int64),
        ("z_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("dout", "total", "dz")),
        ("direction", _BackwardDirection * 2),
    ]


class _PartialSum(ctypes.Structure):
    """``PartialSum``."""

    _fields_ = [
        ("parts", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "size", "columns", "row", "stored")),
    ]


class _PartialSums(ctypes.Structure):
    """``PartialSums``."""

    _fields_ = [("count", ctypes.c_int64), ("of", _PartialSum * _MOST_SUMS)]


def scan_backward(dy: Tensor, s: Scan, kept: Tensor) -> ScanGradients:
    """Return the gradients of sum(y * dy) of one direction; ``kept`` as ``scan_forward`` left it."""
    return _run(dy, [s], None, [], None, None, kept.unsqueeze(0))[0][0]


def bi_scan_backward(
    dout: Tensor, scans: list[Scan], z: Tensor, weights: list[Tensor], total: Tensor, kept: Tensor
) -> tuple[list[ScanGradients], list[Tensor], Tensor]:
    """Return each direction's gradients, those of its [B | C] (b, l, 2n), and that of the gate.

    The gradient of delta is (b, l, e) also where delta came as rank rows.
    """
    dz = torch.empty_like(dout, memory_format=torch.contiguous_format)
    gradients, joined = _run(dout, scans, z, weights, total, dz, kept)
    return gradients, [both.flatten(2) for both in joined], dz


def _run(
    dout: Tensor,
    scans: list[Scan],
    z: Tensor | None,
    weights: list[Tensor],
    total: Tensor | None,
    dz: Tensor | None,
    kept: Tensor,
) -> tuple[list[ScanGradients], list[Tensor]]:
    """Queue the kernels; return the gradients, and those of B and C as they lie, (b, l, g, 2, n)."""
    s = scans[0]
    batch, length, channels = s.u.shape
    groups, states = s.B.shape[2:]
    dout, kept = dout.contiguous(), kept.contiguous()
    problem = _ScanBackward(batch, length, channels, groups, s.softplus, len(scans) == 1 and s.reverse)
    addresses = Addresses()
    segments = None if s.segments is None else s.segments.contiguous()
    problem.segments, problem.dz = addresses.of(segments), addresses.of(dz)
    problem.dout = addresses.of_sequence(dout)
    problem.total = addresses.of_sequence(None if total is None else total.contiguous())
    addresses.gate(problem, z)
    for place, (q, s) in enumerate(zip(problem.direction, scans, strict=False)):
        addresses.direction(q.given, s, weights[place] if weights else None)
        q.given.kept = addresses.of(kept[place])
    kind = (STORED[dout.dtype], states, len(scans))
    options = {
        "aligned": addresses.are_aligned(channels // groups),
        "events": segments is not None,
        "rank": weights[0].shape[1] if weights else 0,
    }
    kernel = cuda_library.kernel(scan_backward_kernel(*kind, **options), dout.device)
    threads, shared_bytes, tile_channels, block_warps = geometry(kernel, _GEOMETRY)
    tiles = -(-(channels // groups) // tile_channels)
    warps = batch * len(scans) * groups * tiles
    problem.spans = spans = _num_spans(warps, num_checkpoints(length), dout.device)
    outputs = [_outputs(s, tiles, spans) for s in scans]
    for q, out in zip(problem.direction, outputs, strict=False):
        for name, tensor in out.items():
            setattr(q, name, addresses.of(tensor))
    if spans > 1:
        carry = cuda_library.kernel(scan_backward_carry_kernel(*kind, **options), dout.device)
        carry.launch((-(-warps * (spans - 1) // block_warps), 1, 1), (threads, 1, 1), shared_bytes, problem)
    kernel.launch((-(-warps * spans // block_warps), 1, 1), (threads, 1, 1), shared_bytes, problem)
    return _gathered(outputs)


def _num_spans(warps: int, chunks: int, device: torch.device) -> int:
    """Return into how many spans time is cut, each of which has a whole chunk at least."""
    room = _WARPS_WANTED * cuda_arguments.multiprocessors(device) // warps
    spans = max(1, min(room, chunks))
    # as many as have work when all but the last are equally long
    return -(-chunks // -(-chunks // spans))


def _outputs(s: Scan, tiles: int, spans: int) -> dict[str, Tensor]:
    """Return memory for what the kernel writes about one direction."""
    batch, length, channels = s.u.shape
    groups, states = s.B.shape[2:]

    def floats(*shape: int) -> Tensor:
        return s.u.new_empty(shape, dtype=torch.float32)

    outputs = {name: s.u.new_empty(batch, length, channels) for name in ("du", "ddelta")}
    outputs["dA"] = floats(batch, spans, channels, states)
    outputs["dBC"] = floats(tiles, batch, length, groups, 2, states)
    for name, given in (("dD", s.D), ("dbias", s.bias)):
        if given is not None:
            outputs[name] = floats(batch, spans, channels)
    if s.initial is not None:
        outputs["dinitial"] = floats(batch, channels, states)
    if spans > 1:
        outputs["carry"] = floats(batch, spans - 1, 2, states, channels)
    return outputs


def _gathered(outputs: list[dict[str, Tensor]]) -> tuple[list[ScanGradients], list[Tensor]]:
    """Add up what is in parts."""
    dtype = outputs[0]["du"].dtype
    sums = _PartialSums()
    added: list[dict[str, Tensor]] = [{} for _ in outputs]
    blocks = 0
    for out, of in zip(outputs, added, strict=True):
        for name in ("dBC", "dA", "dD", "dbias"):
            if name not in out:
                continue
            # of sequences the first dimension counts parts, of parameters the first two do
            parts = out[name] if name == "dBC" else out[name].flatten(0, 1)
            of[name] = parts.new_empty(parts.shape[1:], dtype=dtype if name == "dBC" else torch.float32)
            size = of[name].numel()
            sums.of[sums.count] = _PartialSum(
                parts.data_ptr(), of[name].data_ptr(), len(parts), size, size, size, name == "dBC"
            )
            sums.count += 1
            blocks += -(-size // _SUM_THREADS)
    device = outputs[0]["du"].device
    kernel = cuda_library.kernel(sum_kernel(STORED[dtype]), device)
    kernel.launch((blocks, 1, 1), (_SUM_THREADS, 1, 1), 0, sums)
    gradients = [
        ScanGradients(
            u=out["du"],
            delta=out["ddelta"],
            A=of["dA"],
            B=of["dBC"][..., 0, :],
            C=of["dBC"][..., 1, :],
            D=of.get("dD"),
            bias=of.get("dbias"),
            initial=out.get("dinitial"),
        )
        for out, of in zip(outputs, added, strict=True)
    ]
    return gradients, [of["dBC"] for of in added]
