"""Compiles what the sections will launch, all processors at once, before anything is timed."""

from __future__ import annotations

from gpu.problems import DTYPES, SIZES
from gpu.session import Figures, Session
from gpu.tuning import POLYNOMIALS

from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.registry import (
    INSTANTIATIONS,
    SCAN_RANKS,
    SCAN_SPLITS,
    TF32_INSTANTIATIONS,
    Instantiation,
    conv_backward_kernel,
    conv_forward_kernel,
    norm_backward_kernel,
    norm_forward_kernel,
    scan_backward_carry_kernel,
    scan_backward_kernel,
    scan_forward_kernel,
)


def wanted() -> list[Instantiation]:
    """Return what the sections launch: what VideoMamba runs, and what is only proved or tried."""
    proved = [kernel for io in DTYPES for kernel in _proved(io)]
    tried = [
        scan_forward_kernel("bf16", 16, 2, aligned=True, events=False, rank=size.rank, polynomial=number)
        for size in SIZES.values()
        for number in POLYNOMIALS
    ]
    return list(dict.fromkeys([*INSTANTIATIONS, *TF32_INSTANTIATIONS, *proved, *tried]))


def _proved(io: str) -> list[Instantiation]:
    """Return the kernels of odd problems: addresses not aligned, other numbers of states, other widths."""
    kernels = []
    odd = ((16, False, 0), (8, True, 0), (32, True, 0), *((16, True, rank) for rank in SCAN_RANKS))
    for states, aligned, rank in odd:
        if io == "fp32" and rank:
            continue
        for events, splits in SCAN_SPLITS.items():
            options = {"aligned": aligned, "events": events, "rank": rank}
            kernels += [scan_forward_kernel(io, states, 2, split=split, **options) for split in splits]
            kernels += [
                kernel(io, states, 2, **options)
                for kernel in (scan_backward_kernel, scan_backward_carry_kernel)
            ]
    for conv in (conv_forward_kernel, conv_backward_kernel):
        kernels += [conv(io, 4, 2, aligned=False, segments=segments) for segments in (False, True)]
        kernels.append(conv(io, 4, 1, aligned=True, segments=False))
    for norm in (norm_forward_kernel, norm_backward_kernel):
        kernels += [norm(io, pieces, aligned=aligned) for pieces in (0, 1) for aligned in (False, True)]
    return kernels


def prepare(session: Session) -> Figures:
    """Compile and load all of them."""
    if not (session.ours == "cuda" and session.device.is_gpu):
        return {"kernels": 0}
    place = session.device.place
    index = 0 if place.index is None else place.index
    made = cuda_library.library().prepare(index, wanted())
    print(f"prepare: {made.num_kernels} kernels, {made.num_compiled} compiled now, {made.seconds:.1f} s")
    return {"kernels": made.num_kernels, "compiled": made.num_compiled, "seconds": made.seconds}
