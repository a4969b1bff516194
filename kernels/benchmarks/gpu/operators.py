"""What the device can do at most, and how near each operator by itself comes to that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import official
import torch
from gpu.problems import (
    Load,
    conv_arguments,
    loads,
    norm_arguments,
    run_conv,
    run_norm,
    run_scan,
    scan_arguments,
)
from gpu.session import Figures, Session
from torch import Tensor

# exponentials of a step and channel in one direction, with softplus and half a gate; made in a clock
EXPONENTIALS, EXPONENTIALS_PER_CLOCK = 17.5, 16
# instructions of the way back for a step and channel in one direction, as designed; issued in a clock
BACKWARD_SLOTS, SLOTS_PER_CLOCK = 360, 128


def ceilings(session: Session) -> Figures:
    """Measure copying and multiplying."""
    num_bytes = 2**24 if session.is_small else 2**30
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=session.device.place)
    target = torch.empty_like(source)
    size = 256 if session.is_small else 8192
    a = torch.randn(size, size, device=session.device.place, dtype=torch.bfloat16)
    copy = session.device.time_ms(lambda: target.copy_(source), session.seconds)
    product = session.device.time_ms(lambda: a @ a, session.seconds)
    session.copy_bytes_per_s = 2e3 * num_bytes / copy["median_ms"]
    rows = {
        "copy_tb_per_s": 1e-12 * session.copy_bytes_per_s,
        "bf16_tflop_per_s": 2e-9 * size**3 / product["median_ms"],
    }
    print(f"ceilings: {rows['copy_tb_per_s']:.2f} TB/s, {rows['bf16_tflop_per_s']:.0f} TFLOP/s", flush=True)
    return rows


def scan(session: Session) -> Figures:
    """Time both directions' scans; ours multiplies dt's rows as well, mamba-ssm is given delta."""
    rows: Figures = {}
    for load in session.shared_out(loads(session)):
        shape = (load.batch, load.length, load.size.channels)
        arguments = scan_arguments(session, *shape, torch.bfloat16, rank=load.size.rank)
        dout = torch.randn_like(arguments[0])
        forward = session.everybody(partial(run_scan, arguments, None))
        both = session.everybody(partial(run_scan, arguments, dout))
        if "official" in session.rivals:
            theirs = _official_scans(arguments)
            forward["official"] = partial(_run_official, theirs, None)
            both["official"] = partial(_run_official, theirs, dout.transpose(1, 2).contiguous())
        row = {"forward": session.compared(f"scan {load.key} forward", forward)}
        steps = 2 * load.batch * load.length * load.size.channels
        session.beside_floor(row["forward"], _floor_ms(session, steps, EXPONENTIALS, EXPONENTIALS_PER_CLOCK))
        with session.serving(session.ours):
            _, *kept = torch.ops.vlm.bi_scan(*arguments, True)
        back = partial(torch.ops.vlm.bi_scan_backward, dout, *arguments, *kept)
        row["backward"] = session.compared(f"scan {load.key} backward", {session.ours: back})
        session.beside_floor(row["backward"], _floor_ms(session, steps, BACKWARD_SLOTS, SLOTS_PER_CLOCK))
        del kept, back
        row["forward_backward"] = session.compared(f"scan {load.key} forward_backward", both)
        rows[load.key] = row
    return rows


def _floor_ms(session: Session, steps: int, each: float, per_clock: int) -> float | None:
    """Return how long the unit that bounds a pass is busy for so many steps of a channel."""
    clocks_per_s = session.device.clocks_per_s()
    return 1e3 * steps * each / per_clock / clocks_per_s if clocks_per_s else None


def _official_scans(arguments: list[Any]) -> list[list[Tensor]]:
    """Return what the published code's two scans take, channels first, delta multiplied already."""
    u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, A_f, A_b, D_f, D_b, bias_f, bias_b, w_f, w_b, _ = arguments

    def first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()

    sides = []
    for u, rows, weight, bc, A, D, bias in (
        (u_f, delta_f, w_f, bc_f, A_f, D_f, bias_f),
        (u_b, delta_b, w_b, bc_b, A_b, D_b, bias_b),
    ):
        B, C = (first(part).unsqueeze(1) for part in bc.chunk(2, -1))
        sides.append([first(u), first(rows @ weight.t()), A, B, C, D, first(z), bias])
    sides[1] = [x.flip(-1) if place in (0, 1, 3, 4) else x for place, x in enumerate(sides[1])]
    return sides


def _run_official(sides: list[list[Tensor]], dout: Tensor | None) -> object:
    """Run both scans and, with ``dout`` (b, e, l), their backward passes."""
    if dout is None:
        with torch.no_grad():
            return official.scans(*sides)
    leaves = [[x.detach().requires_grad_() for x in side] for side in sides]
    leaves[1][6] = leaves[0][6]  # one gate
    out = official.scans(*leaves)
    return torch.autograd.grad(out, [*leaves[0], *leaves[1][:6], leaves[1][7]], dout)


def conv(session: Session) -> Figures:
    """Time both directions' convolutions; they move x and two outputs, and one more on the way back."""
    return _beside_bytes(
        session,
        "conv",
        lambda load: conv_arguments(session, load.batch, load.length, load.size.channels, torch.bfloat16),
        run_conv,
        torch.ops.vlm.conv2_backward,
        bytes_of_element=(6, 8),
    )


def norm(session: Session) -> Figures:
    """Time the addition to the residual stream and its norm."""
    return _beside_bytes(
        session,
        "norm",
        lambda load: norm_arguments(session, load.batch, load.length, load.size.width, torch.bfloat16),
        run_norm,
        torch.ops.vlm.add_rms_norm_backward,
        # x, the stream before, the norm, the stream; both gradients, the stream, the gradient in both dtypes
        bytes_of_element=(2 + 4 + 2 + 4, 2 + 4 + 4 + 2 + 4),
    )


def _beside_bytes(
    session: Session,
    name: str,
    draw: Callable[[Load], list[Any]],
    run: Callable[[list[Any], Tensor | None], object],
    backward: Callable[..., object],
    *,
    bytes_of_element: tuple[int, int],
) -> Figures:
    """Time an operator that memory bounds, both passes, beside PyTorch and what its bytes take to move."""
    rows: Figures = {}
    for load in session.shared_out(loads(session)):
        arguments = draw(load)
        x = arguments[0]
        dout = torch.randn_like(x)
        if name == "conv":
            given = (dout, torch.randn_like(x), *arguments)
        else:
            stream = x + arguments[1]
            given = (dout, torch.randn_like(stream), stream, arguments[2], arguments[3], True)
        passes: dict[str, Callable[[], object]] = {
            "forward": partial(run, arguments, None),
            "backward": partial(backward, *given),
        }
        row = {}
        for (job, timed), size in zip(passes.items(), bytes_of_element, strict=True):
            runs: dict[str, Callable[[], object]] = {session.ours: timed, "chunked": timed}
            row[job] = session.compared(f"{name} {load.key} {job}", runs)
            session.beside_floor(row[job], session.bytes_floor_ms(size * x.numel()))
        rows[load.key] = row
    return rows
