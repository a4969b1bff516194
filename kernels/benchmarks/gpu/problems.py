"""The sizes that are timed, and the inputs of every operator, drawn on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu.session import Session
from torch import Tensor

from vlm.models.video_mamba import SIZES as MODELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLACES = 196
# clips, frames of 224 x 224
LOADS = ((64, 8), (8, 64), (1, 64))
# numbers that the host draws quickly
_FEW = 1 << 22


@dataclass(frozen=True, slots=True)
class Size:
    """A published size.

    Attributes:
        model: Its name among the encoder's sizes.
        rank: Columns of dt as the kernels get them, filled up.
    """

    model: str
    rank: int

    @property
    def width(self) -> int:
        """Channels of a token."""
        return MODELS[self.model][0]

    @property
    def channels(self) -> int:
        """Channels of the scan."""
        return 2 * self.width


SIZES = {"Ti": Size("tiny", 16), "S": Size("small", 32), "M": Size("middle", 48)}


@dataclass(frozen=True, slots=True)
class Load:
    """What one figure is taken of."""

    key: str
    size: Size
    batch: int
    frames: int
    length: int


def loads(session: Session) -> list[Load]:
    """Return every size with every number of clips and frames."""
    found = []
    for name, size in SIZES.items():
        for batch, frames in LOADS:
            length = 1 + (4 if session.is_small else PLACES) * frames
            key = f"{name} B{batch} T{frames}"
            found.append(Load(key, size, 1 if session.is_small else batch, frames, length))
    return found


def single_clips(session: Session) -> list[Load]:
    """Return every size with one clip of every number of frames."""
    found: dict[str, Load] = {}
    for load in loads(session):
        key = f"{load.key.split()[0]} B1 T{load.frames}"
        found[key] = replace(load, key=key, batch=1)
    return list(found.values())


def normal(session: Session, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers drawn in fp32 and rounded; few are the same on every device."""
    place = torch.device("cpu") if math.prod(shape) <= _FEW else session.device.place
    return torch.randn(shape, device=place).to(dtype).to(session.device.place)


def segments(session: Session, batch: int, length: int) -> Tensor:
    """Return numbers (b, l) of segments, some ten steps each."""
    return (torch.rand(batch, length) < 0.1).cumsum(1, dtype=torch.int32).to(session.device.place)


def scan_arguments(
    session: Session,
    batch: int,
    length: int,
    channels: int,
    dtype: torch.dtype,
    *,
    states: int = 16,
    rank: int = 0,
    is_packed: bool = False,
) -> list[Any]:
    """Return the arguments of ``vlm::bi_scan`` up to ``save``; with a rank, delta as rows and weights.

    The gate, dt, B and C lie in wider rows, as the projections leave them.
    """
    torch.manual_seed(0)
    u_f, u_b = (normal(session, batch, length, channels, dtype=dtype) for _ in range(2))
    z = normal(session, batch, length, 2 * channels, dtype=dtype)[..., channels:]
    width = rank or channels
    rows = [normal(session, batch, length, width + 2 * states, dtype=dtype) for _ in range(2)]
    (delta_f, bc_f), (delta_b, bc_b) = (torch.split(x, [width, 2 * states], -1) for x in rows)
    rates = -torch.arange(1.0, states + 1, device=session.device.place).repeat(channels, 1)
    parameters = [rates, rates * 0.9, *(normal(session, channels) for _ in range(4))]
    weights = [normal(session, channels, rank, dtype=dtype) / rank**0.5 if rank else None for _ in range(2)]
    packed = segments(session, batch, length) if is_packed else None
    return [u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, *parameters, *weights, packed]


def run_scan(arguments: list[Any], dout: Tensor | None) -> list[Tensor]:
    """Return the operator's output and, with ``dout``, all gradients."""
    if dout is None:
        return [torch.ops.vlm.bi_scan(*arguments, False)[0]]
    leaves = _leaves(arguments[:-1])
    out = torch.ops.vlm.bi_scan(*leaves, arguments[-1], True)[0]
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]


def conv_arguments(
    session: Session,
    batch: int,
    length: int,
    channels: int,
    dtype: torch.dtype,
    *,
    is_packed: bool = False,
    is_single: bool = False,
) -> list[Any]:
    """Return the arguments of ``vlm::conv2``; x is the first half of wider rows."""
    torch.manual_seed(0)
    x = normal(session, batch, length, 2 * channels, dtype=dtype)[..., :channels]
    taps = [[normal(session, channels, 4), normal(session, channels)] for _ in range(2)]
    second = [None, None] if is_single else taps[1]
    return [x, *taps[0], *second, segments(session, batch, length) if is_packed else None]


def run_conv(arguments: list[Any], dout: Tensor | None) -> list[Tensor]:
    """Return both outputs and, with ``dout`` for both, all gradients."""
    if dout is None:
        return [each for each in torch.ops.vlm.conv2(*arguments) if each.numel()]
    leaves = _leaves(arguments[:-1])
    outputs = [each for each in torch.ops.vlm.conv2(*leaves, arguments[-1]) if each.numel()]
    present = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, present, [dout] * len(outputs))
    return [*(each.detach() for each in outputs), *gradients]


def norm_arguments(
    session: Session, batch: int, length: int, width: int, dtype: torch.dtype, *, has_residual: bool = True
) -> list[Any]:
    """Return the arguments of ``vlm::add_rms_norm``."""
    torch.manual_seed(0)
    residual = normal(session, batch, length, width) if has_residual else None
    return [normal(session, batch, length, width, dtype=dtype), residual, normal(session, width), 1e-5]


def run_norm(arguments: list[Any], dout: Tensor | None) -> list[Tensor]:
    """Return the norm and the sum and, with ``dout`` for the norm, all gradients; the sum's is twice that."""
    if dout is None:
        return list(torch.ops.vlm.add_rms_norm(*arguments))
    leaves = _leaves(arguments[:-1])
    out, stream = torch.ops.vlm.add_rms_norm(*leaves, arguments[-1])
    present = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([out, stream], present, [dout, 2 * dout.to(stream.dtype)])
    return [out.detach(), stream.detach(), *gradients]


def _leaves(arguments: list[Any]) -> list[Any]:
    return [None if x is None else x.detach().requires_grad_() for x in arguments]


def in_fp64(arguments: list[Any]) -> list[Any]:
    """Return the same arguments in fp64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
