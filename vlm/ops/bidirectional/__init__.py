"""VideoMamba's two-directional mixer between its input and output projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.ops.bidirectional import registration as _registration  # noqa: F401  registers the operators
from vlm.ops.causal_conv import conv2
from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda.registry import SCAN_RANKS
from vlm.ops.selective_scan import segment_numbers

Projection = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Branch:
    """The parameters of one direction.

    Attributes:
        conv_weight: (e, 1, w) or (e, w) depthwise taps.
        conv_bias: (e,) or None.
        x_proj: (r + 2n, e) weight, or a module or function (b, l, e) -> (b, l, r + 2n); the rows are
            [dt (r) | B (n) | C (n)].
        dt_proj: (e, r) weight, or a module or function (b, l, r) -> (b, l, e). A module that adds a bias
            of its own needs ``dt_bias=None``; a weight goes with ``dt_bias``, added in fp32.
        dt_bias: (e,) added before softplus, or None.
        A_log: (e, n); A = -exp(A_log).
        D: (e,) skip weight.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Projection
    dt_proj: Projection
    dt_bias: Tensor | None
    A_log: Tensor
    D: Tensor

    def __post_init__(self) -> None:
        """Refuse a bias that would be added twice."""
        if self.dt_bias is not None and getattr(self.dt_proj, "bias", None) is not None:
            raise ValueError(
                "dt_proj adds a bias of its own, so dt_bias must be None; or pass its weight with dt_bias"
            )


def bidirectional_mamba(
    xz: Tensor, forward: Branch, backward: Branch | None, *, segment_starts: Tensor | None = None
) -> Tensor:
    """Mix a sequence in both directions: convolve, project, scan, add, gate.

    out = (scan_forward(x) + scan_backward(x)) * silu(z), where x and z are the halves of ``xz``. The branches
    are summed, not averaged. No tensor is flipped.

    Args:
        xz: (batch, length, 2e): the input projection's output; x first, then the gate z.
        forward: Parameters of the direction that sees the past.
        backward: Parameters of the direction that sees the future, or None for a one-directional block.
        segment_starts: (length,) or (batch, length) bool, True where another sequence begins; nothing crosses
            such a border.

    Returns:
        (batch, length, e) in the dtype of ``xz``, for the output projection.

    Raises:
        ValueError: A shape does not fit; the message names the argument.
        KernelError: ``VLM_SCAN_BACKEND`` forces a backend that cannot serve.

    Source: Li et al. 2024, VideoMamba, section 3.2; Zhu et al. 2024, Vision Mamba, algorithm 1.
    """
    channels = forward.A_log.shape[0]
    if xz.dim() != 3 or xz.shape[2] != 2 * channels:
        raise ValueError(
            f"xz must be (batch, length, {2 * channels}), twice A_log's rows; got {tuple(xz.shape)}"
        )
    x, z = xz.chunk(2, -1)
    u_f, u_b = conv2(
        x,
        forward.conv_weight,
        forward.conv_bias,
        None if backward is None else backward.conv_weight,
        None if backward is None else backward.conv_bias,
        segment_starts=segment_starts,
    )
    # two products, one for each direction: joined into one they would need both outputs of the convolution in
    # one tensor
    delta_f, bc_f, weight_f = _project("forward", u_f, forward)
    A_f, A_b = _rates(forward), None
    if backward is None or u_b is None:
        delta_b = bc_b = weight_b = None
    else:
        delta_b, bc_b, weight_b = _project("backward", u_b, backward)
        A_b = _rates(backward)
    inputs = (u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, A_f, A_b, _skip(forward), _skip(backward))
    parameters = (forward.dt_bias, None if backward is None else backward.dt_bias, weight_f, weight_b)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *parameters))
    segments = segment_numbers(segment_starts, xz.shape[0], xz.shape[1], xz.device)
    out: Tensor = torch.ops.vlm.bi_scan(*inputs, *parameters, segments, save)[0]
    return out


def _project(name: str, u: Tensor, branch: Branch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return delta (b, l, e) before bias and softplus, [B | C] (b, l, 2n) and None.

    Where dt_proj is a weight, the operator multiplies by it: then delta comes as rows (b, l, r), and the
    weight (e, r) with it. For the CUDA kernels r is filled up with zero columns.
    """
    num_states = branch.A_log.shape[1]
    x_proj, num_filled = _filled(branch.x_proj, u, num_states)
    rows = _apply(x_proj, u)
    rank = rows.shape[-1] - 2 * num_states
    if rank < 1:
        raise ValueError(
            f"{name}.x_proj must give more than 2 x {num_states} rows [dt | B | C], got {rows.shape[-1]}"
        )
    dt, bc = torch.split(rows, [rank, 2 * num_states], -1)
    bc = bc.to(u.dtype)
    weight = branch.dt_proj
    if isinstance(weight, Tensor):
        if weight.shape != (u.shape[2], rank - num_filled):
            raise ValueError(
                f"{name}.dt_proj must be ({u.shape[2]}, {rank - num_filled}), got {tuple(weight.shape)}"
            )
        weight = weight.to(dt.dtype)
        return dt, bc, torch.nn.functional.pad(weight, (0, num_filled)) if num_filled else weight
    delta = weight(dt[..., : rank - num_filled])
    if delta.shape != u.shape:
        raise ValueError(f"{name}.dt_proj must give {tuple(u.shape)}, got {tuple(delta.shape)}")
    return delta.to(u.dtype), bc, None


def _filled(x_proj: Projection, u: Tensor, num_states: int) -> tuple[Projection, int]:
    """Return x_proj and how many zero rows it got behind dt: on a GPU B and C shall begin at aligned columns.

    A copy of the narrow weight in every call costs less than copies of B and C for every token. What is not
    known to be a plain product stays as it is.
    """
    weight = x_proj
    if type(x_proj) is nn.Linear and x_proj.bias is None and not _is_watched(x_proj):
        weight = x_proj.weight
    if not isinstance(weight, Tensor) or not cuda_arguments.on_gpu(u):
        return x_proj, 0
    rank = weight.shape[0] - 2 * num_states
    num_filled = -rank % SCAN_RANKS[0]
    if rank < 1 or not num_filled:
        return weight, 0
    weight = weight.to(u.dtype)
    zeros = weight.new_zeros(num_filled, weight.shape[1])
    return torch.cat([weight[:rank], zeros, weight[rank:]]), num_filled


def _is_watched(module: nn.Module) -> bool:
    """Return whether calling the module does more than its forward method."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _apply(projection: Projection, x: Tensor) -> Tensor:
    """Multiply by a weight, or call the module."""
    if isinstance(projection, Tensor):
        return torch.nn.functional.linear(x, projection.to(x.dtype))
    return projection(x)


def _rates(branch: Branch) -> Tensor:
    """Return A (e, n)."""
    return -torch.exp(_at_least_fp32(branch.A_log))


def _skip(branch: Branch | None) -> Tensor | None:
    """Return D."""
    return None if branch is None else branch.D


def _at_least_fp32(x: Tensor) -> Tensor:
    """Return ``x`` in fp32 or fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
