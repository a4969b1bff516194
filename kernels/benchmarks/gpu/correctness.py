"""Every operator against fp64: outputs and gradients, twice to the bit, into memory full of NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import Case, draw, forced, job, relative_error, truth, weights
from gpu import problems
from gpu.problems import DTYPES, conv_arguments, norm_arguments, run_conv, run_norm, run_scan, scan_arguments
from gpu.session import Figures, Session
from torch import Tensor

from vlm.ops.cuda import arguments as cuda_arguments

# relative to the norm, against fp64 on the same rounded inputs
OUTPUT_LIMITS = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 3e-3}
GRADIENT_LIMITS = {"fp32": 5e-5, "bf16": 5e-3, "fp16": 5e-3}
LENGTHS = (1, 2, 15, 16, 17, 31, 63, 197)
LONG = 1569
# the loop over the steps is the judge up to here, blocks of steps behind it
_LONGEST_LOOP = 63

Draw = Callable[[Session, torch.dtype], list[Any]]
Run = Callable[[list[Any], Tensor | None], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Proof:
    """One problem of one operator.

    Attributes:
        name: What the report calls it.
        operator: Which one.
        draw: Returns its arguments in a dtype.
        shape: Of the output and its gradient.
        num_outputs: How many results of ``run`` are outputs.
    """

    name: str
    operator: str
    draw: Draw
    shape: tuple[int, int, int]
    num_outputs: int


def _scan(batch: int, length: int, channels: int, **options: Any) -> Proof:
    name = f"b{batch} L{length} e{channels} {options or ''}"
    draw_it = partial(_draw, scan_arguments, (batch, length, channels), options)
    return Proof(name, "bi_scan", draw_it, (batch, length, channels), 1)


def _conv(batch: int, length: int, channels: int, **options: Any) -> Proof:
    name = f"b{batch} L{length} e{channels} {options or ''}"
    draw_it = partial(_draw, conv_arguments, (batch, length, channels), options)
    num_outputs = 1 if options.get("is_single") else 2
    return Proof(name, "conv2", draw_it, (batch, length, channels), num_outputs)


def _norm(batch: int, length: int, width: int, **options: Any) -> Proof:
    name = f"b{batch} L{length} d{width} {options or ''}"
    draw_it = partial(_draw, norm_arguments, (batch, length, width), options)
    return Proof(name, "add_rms_norm", draw_it, (batch, length, width), 2)


def _draw(
    how: Callable[..., list[Any]], shape: tuple[int, int, int], options: dict[str, Any], *where: Any
) -> list[Any]:
    session, dtype = where
    return how(session, *shape, dtype, **options)


RUNS: dict[str, Run] = {"bi_scan": run_scan, "conv2": run_conv, "add_rms_norm": run_norm}
PROOFS = (
    *(_scan(2, length, 64) for length in LENGTHS),
    *(_scan(2, length, 64, rank=16) for length in LENGTHS),
    # channels that fill no tile, and no vector
    *(_scan(2, length, channels) for length in (17, 197) for channels in (40, 37)),
    _scan(2, 63, 40, is_packed=True),
    _scan(2, 197, 96, rank=16, is_packed=True),
    _scan(2, 197, 37, is_packed=True),
    _scan(2, 75, 96, states=8),
    _scan(2, 197, 96, states=8, is_packed=True),
    _scan(2, 75, 96, states=32),
    _scan(4, 197, 768, rank=32),
    _scan(1, LONG, 384, rank=16),
    _scan(1, LONG, 1152, rank=48),
    _scan(2, LONG, 384, is_packed=True),
    # enough warps to fill a GPU without sharing time
    _scan(64, 197, 384, rank=16),
    *(_conv(2, length, 64) for length in LENGTHS),
    *(_conv(2, length, channels) for length in (17, 197) for channels in (40, 37)),
    *(_conv(2, length, 40, is_packed=True) for length in (2, 31, 197)),
    _conv(2, 63, 64, is_single=True),
    _conv(2, 197, 37, is_packed=True),
    _conv(2, LONG, 1152),
    _conv(2, LONG, 384, is_packed=True),
    *(_norm(2, length, 192) for length in LENGTHS),
    *(_norm(2, 31, width) for width in (37, 100, 384, 576, 1100)),
    _norm(2, 31, 192, has_residual=False),
    _norm(1, LONG, 576),
)
SMALL = (
    _scan(2, 17, 64),
    _scan(2, 17, 64, rank=16),
    _scan(1, 75, 32, is_packed=True),
    _conv(2, 17, 40, is_packed=True),
    _norm(2, 17, 192),
)
# a whole mixer with its products, in fp32; the draw and the truth are those of the CPU's benchmark
MIXER = Case(name="mixer", kind="block", batch=2, length=63, channels=64, rank=12)


def correctness(session: Session) -> Figures:
    """Return the greatest errors of each operator in each dtype."""
    rows: Figures = {}
    for name, dtype in DTYPES.items():
        worst: dict[str, dict[str, float]] = {}
        for proof in SMALL if session.is_small else PROOFS:
            found = worst.setdefault(proof.operator, {"output": 0.0, "gradient": 0.0})
            for kind, error in prove(session, proof, name, dtype).items():
                found[kind] = max(found[kind], error)
        for operator, errors in worst.items():
            print(
                f"correctness {name} {operator}: outputs {errors['output']:.1e}, "
                f"gradients {errors['gradient']:.1e}",
                flush=True,
            )
        rows[name] = worst
    rows["mixer"] = prove_mixer(session)
    return rows


def prove(session: Session, proof: Proof, name: str, dtype: torch.dtype) -> dict[str, float]:
    """Run a problem twice, with and without gradients, as on a full and on an empty GPU."""
    run = RUNS[proof.operator]
    arguments = proof.draw(session, dtype)
    dout = problems.normal(session, *proof.shape, dtype=dtype)
    with forced("reference" if proof.shape[1] <= _LONGEST_LOOP else "chunked"):
        expected = run(problems.in_fp64(arguments), dout.double())
    errors = {"output": 0.0, "gradient": 0.0}
    for plan in ("", "full", "empty"):
        if plan and proof.shape[1] == LONG:
            continue  # takes long, and is shared out as it would be in use
        with forced(session.ours), poisoned(), _as_on(plan):
            found, again = run(arguments, dout), run(arguments, dout)
            plain = run(arguments, None)
        outputs = proof.num_outputs
        errors["output"] = max(
            errors["output"],
            relative_error(plain, expected[:outputs]),
            relative_error(found[:outputs], expected[:outputs]),
        )
        errors["gradient"] = max(errors["gradient"], relative_error(found[outputs:], expected[outputs:]))
        repeats = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
        within = errors["output"] <= OUTPUT_LIMITS[name] and errors["gradient"] <= GRADIENT_LIMITS[name]
        if not (within and repeats):
            session.wrong(f"{proof.operator} {name} {proof.name} {plan}: {errors}, repeats {repeats}")
    return errors


def prove_mixer(session: Session) -> dict[str, float]:
    """Compare convolutions, products and scans together with fp64."""
    leaves = [x.to(session.device.place).requires_grad_() for x in draw(MIXER)]
    with forced(session.ours), poisoned():
        out = job(MIXER, leaves, gradient=True)()
        gradients = torch.autograd.grad(out, leaves, weights(MIXER).to(session.device.place))
    found = [x.detach().cpu() for x in (out, *gradients)]
    expected = truth(MIXER, gradient=True)
    errors = {
        "output": relative_error(found[:1], expected[:1]),
        "gradient": relative_error(found[1:], expected[1:]),
    }
    print(f"correctness fp32 mixer: output {errors['output']:.1e}, gradients {errors['gradient']:.1e}")
    if not (errors["output"] <= OUTPUT_LIMITS["fp32"] and errors["gradient"] <= GRADIENT_LIMITS["fp32"]):
        session.wrong(f"mixer fp32: {errors}")
    return errors


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _as_on(plan: str) -> Iterator[None]:
    """Share work out as on a GPU that is full with it, or empty beside it; as on this one by default."""
    before = cuda_arguments.multiprocessors
    if plan:
        count = 1 if plan == "full" else 10**6
        cuda_arguments.multiprocessors = lambda _device: count  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda_arguments.multiprocessors = before
