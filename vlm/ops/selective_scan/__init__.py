"""The selective scan with mamba-ssm's signature, on every device and without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.selective_scan import registration as _registration  # noqa: F401  registers the operators

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    segment_starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence of Mamba along the last axis.

    In scan order, with dt = delta + delta_bias, through softplus if asked:
    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t];  out[t] = (sum over states h[t] C[t] + D u[t]) silu(z[t]).

    Args:
        u: (batch, dim, length) in fp32, fp64, bf16 or fp16.
        delta: (batch, dim, length), dtype of ``u``.
        A: (dim, state), real, fp32 or fp64.
        B: (batch, state, length) or (batch, groups, state, length), dtype of ``u``; with groups, channel i
            belongs to group i // (dim / groups).
        C: As ``B``.
        D: (dim,) skip weight, fp32 or fp64.
        z: (batch, dim, length) gate, dtype of ``u``.
        delta_bias: (dim,), fp32 or fp64.
        delta_softplus: Pass delta + delta_bias through softplus.
        return_last_state: Return the last state as well.
        initial_state: (batch, dim, state) state before the first step; zeros without it.
        reverse: Scan from the last step to the first (no tensor is flipped); the last state is then that of
            the first step.
        segment_starts: (length,) or (batch, length) bool, True where another sequence begins. No state
            crosses such a border; the first step in scan order continues ``initial_state`` in any case.

    Returns:
        ``out`` (batch, dim, length) in the dtype of ``u``; with ``return_last_state`` also the state after
        the last step, (batch, dim, state) in fp32 (fp64 for fp64), which is not differentiable.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
        KernelError: ``VLM_SCAN_BACKEND`` forces a backend that cannot serve.

    Source: Gu and Dao 2023, Mamba, section 3; signature of mamba-ssm's ``selective_scan_fn``.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    segments = segment_numbers(segment_starts, u.shape[0], u.shape[2], u.device)
    # (batch, state, length) is one group
    B4 = B.unsqueeze(1) if B.dim() == 3 else B
    C4 = C.unsqueeze(1) if C.dim() == 3 else C
    inputs = (u, delta, A, B4, C4, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, last, *_ = torch.ops.vlm.selective_scan(*inputs, segments, delta_softplus, reverse, save)
    return (out, last) if return_last_state else out


def segment_numbers(
    segment_starts: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Number the segments: (length,) or (batch, length) bool starts to (batch, length) int32, or None.

    Raises:
        ValueError: Wrong shape, dtype or device.
    """
    if segment_starts is None:
        return None
    if segment_starts.dtype != torch.bool or segment_starts.device != device:
        raise ValueError(
            f"segment_starts must be bool on {device}, got {segment_starts.dtype} on {segment_starts.device}"
        )
    if tuple(segment_starts.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"segment_starts must be ({length},) or ({batch}, {length}), got {tuple(segment_starts.shape)}"
        )
    return segment_starts.expand(batch, length).cumsum(1, dtype=torch.int32)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, unless everything fits together."""
    if u.dim() != 3 or u.dtype not in _FLOATING or 0 in u.shape:
        raise ValueError(
            "u must be (batch, dim, length), non-empty, in fp32, fp64, bf16 or fp16; "
            f"got {tuple(u.shape)} {u.dtype}"
        )
    batch, dim, length = u.shape
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"A must be (dim={dim}, state), got {tuple(A.shape)}")
    state = A.shape[1]
    wide = _registration.wide(u.dtype)
    for name, x in (("delta", delta), ("z", z)):
        _expect(name, x, [(batch, dim, length)], (u.dtype,), u.device)
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        shape = (dim, state) if name == "A" else (dim,)
        _expect(name, x, [shape], (torch.float32, torch.float64), u.device)
    _expect("initial_state", initial_state, [(batch, dim, state)], (wide, u.dtype), u.device)
    for name, x in (("B", B), ("C", C)):
        if x.dim() == 2:
            raise ValueError(
                f"{name} must depend on time: (batch, state, length) or (batch, groups, state, length); "
                f"got the constant {tuple(x.shape)}; expand it over batch and length"
            )
        groups = x.shape[1] if x.dim() == 4 else 1
        _expect(name, x, [(batch, state, length), (batch, groups, state, length)], (u.dtype,), u.device)
        if groups == 0 or dim % groups:
            raise ValueError(f"{name} has {groups} groups, which do not divide dim={dim}")
    if (B.shape[1] if B.dim() == 4 else 1) != (C.shape[1] if C.dim() == 4 else 1):
        raise ValueError(f"C must have as many groups as B {tuple(B.shape)}, got {tuple(C.shape)}")


def _expect(
    name: str,
    x: Tensor | None,
    shapes: list[tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise unless ``x`` is None or has one of the shapes, one of the dtypes and the device."""
    if x is None:
        return
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like u, got {x.device}")
