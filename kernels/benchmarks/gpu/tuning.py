"""Choices that only a GPU can make: exponentials by polynomial, products of fp32 in tf32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from cases import relative_error
from gpu import problems
from gpu.problems import in_fp64, loads, run_scan, scan_arguments
from gpu.session import Figures, Session

from vlm.ops.cuda import scan_calls

POLYNOMIALS = range(17)
# tf32 has eleven bits where fp32 has twenty-four; a sum over the rank averages
TF32_LIMIT = 2e-3


def polynomial(session: Session) -> Figures:
    """Time the forward scan of a full GPU with every share of its exponentials by polynomial."""
    full = "B{} T{}".format(*problems.LOADS[0])
    wanted = [each for each in loads(session) if each.key.endswith(full)]
    rows: Figures = {}
    for load in session.shared_out(wanted):
        arguments = scan_arguments(
            session, load.batch, load.length, load.size.channels, torch.bfloat16, rank=load.size.rank
        )
        forward = partial(run_scan, arguments, None)
        row: Figures = {}
        with session.serving(session.ours):
            expected = [x.double() for x in forward()]
        for number in session.shared_out([0, 2] if session.is_small else list(POLYNOMIALS)):
            if not session.left_s():
                row[str(number)] = {"error": "no time left"}
                continue
            with _polynomial(number), session.serving(session.ours):
                error = relative_error(forward(), expected)
                row[str(number)] = session.measured(session.ours, forward) | {"difference": error}
            if not error < 3e-3:
                session.wrong(f"polynomial {number} of {load.key}: off by {error:.1e}")
        timed = {number: each["median_ms"] for number, each in row.items() if "median_ms" in each}
        if timed:
            best = min(timed, key=lambda number: timed[number])
            print(f"polynomial {load.key}: best {best} of 16, {timed[best]:.4g} ms; {timed}", flush=True)
        rows[load.key] = row
    return rows


@contextmanager
def _polynomial(number: int) -> Iterator[None]:
    before = scan_calls.POLYNOMIAL
    scan_calls.POLYNOMIAL = number
    try:
        yield
    finally:
        scan_calls.POLYNOMIAL = before


def tf32(session: Session) -> Figures:
    """Prove and time fp32 scans whose rank rows are multiplied before, in fp32, and within, in tf32."""
    rows: Figures = {}
    for load in session.shared_out(loads(session)):
        shape = (load.batch, load.length, load.size.channels)
        options = {"rank": load.size.rank}
        small = scan_arguments(session, 1, min(load.length, 75), load.size.channels, torch.float32, **options)
        arguments = scan_arguments(session, *shape, torch.float32, **options)
        dout = torch.randn_like(arguments[0])
        with session.serving("chunked"):
            expected = run_scan(in_fp64(small), torch.ones_like(small[0]).double())
        row: Figures = {}
        for name, precision in (("fp32", "highest"), ("tf32", "high")):
            with _precision(precision), session.serving(session.ours):
                error = relative_error(run_scan(small, torch.ones_like(small[0])), expected)
                row[name] = {
                    "error": error,
                    "forward": session.measured(session.ours, partial(run_scan, arguments, None)),
                    "forward_backward": session.measured(session.ours, partial(run_scan, arguments, dout)),
                }
            if not error < (5e-5 if name == "fp32" else TF32_LIMIT):
                session.wrong(f"tf32 {load.key} {name}: off by {error:.1e}")
            times = [row[name][job].get("median_ms") for job in ("forward", "forward_backward")]
            print(f"tf32 {load.key} {name}: {times} ms, off by {error:.1e}", flush=True)
        rows[load.key] = row
    return rows


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
