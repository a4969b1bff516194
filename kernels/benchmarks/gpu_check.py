"""Prove and time the CUDA kernels on the GPU at hand: python kernels/benchmarks/gpu_check.py --out FILE.

Needs torch, numpy and einops, an NVRTC, no network. The sections run in order, and the JSON is written after
each, so that an interrupted check keeps what it found. ``--only`` runs some of them.

  correctness  the scans through the operators against fp64, every output and gradient, and twice to the bit
  ceilings     what this GPU copies and multiplies in a second
  scan         both directions with delta's product, beside PyTorch's and mamba-ssm's where that imports
  block        everything between two norms            encoder      VideoMamba, inference and training step

Exit code 1 if a number is wrong; ratios are printed only then when all numbers are right. The whole ends
within ``--minutes``: what there is no time for is left out, comparisons first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a GPU machine may hold a checkout and nothing installed

from vlm.errors import KernelError  # noqa: E402
from vlm.models.video_mamba import VideoMamba, sized  # noqa: E402
from vlm.ops import backend  # noqa: E402
from vlm.ops.backends import VARIABLE  # noqa: E402
from vlm.ops.cuda import library as cuda_library  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# relative to the norm, against fp64 on the same rounded inputs
OUTPUT_LIMITS = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 3e-3}
GRADIENT_LIMITS = {"fp32": 5e-5, "bf16": 5e-3, "fp16": 5e-3}
# (length, channels, states, batch)
CHECKED = (
    *((length, 64, 16, 2) for length in (1, 2, 15, 16, 17, 31, 32, 33, 63, 197)),
    (197, 40, 16, 2),
    (75, 384, 8, 2),
    (75, 96, 32, 2),
    (1569, 384, 16, 1),
    (1569, 1152, 16, 2),
    # enough warps to fill a GPU without sharing time
    (197, 384, 16, 64),
)
# columns of rank rows, which half types multiply in the kernel: (length, channels, rank, batch)
CHECKED_RANKS = ((33, 64, 16, 2), (197, 384, 32, 64), (1569, 1152, 48, 1))
# name: channels of the scan, filled rank, model size
SIZES = {"Ti": (384, 16, "tiny"), "S": (768, 32, "small"), "M": (1152, 48, "middle")}
# clips, frames of 224 x 224
LOADS = ((64, 8), (8, 64), (1, 64))
PLACES = 196
# exponentials of a step and channel, with softplus and half a gate; those a multiprocessor makes in a clock
EXPONENTIALS, EXPONENTIALS_PER_CLOCK = 17.5, 16
# comparisons end so long before the time is up; our own figures take no longer
OWN_SECONDS = 100


def main(argv: list[str] | None = None) -> int:
    """Run the sections, print a line for each figure, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="where the results go")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="only this section")
    parser.add_argument("--device", default="cuda", help="cpu proves the program, not the kernels")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time spent on one measurement")
    parser.add_argument("--minutes", type=float, default=8.5, help="most time spent on the whole")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that the program runs")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    check = Check(device, arguments.seconds, 60 * arguments.minutes, arguments.small)
    results: dict[str, Any] = {"machine": check.machine(), "sections": {}}
    for name in arguments.only or SECTIONS:
        start = time.perf_counter()
        try:
            section = SECTIONS[name](check)
        except (KernelError, RuntimeError) as error:
            section = {"error": f"{type(error).__name__}: {error}"}
            check.is_right = False
            print(f"{name}: {section['error']}")
        results["sections"][name] = {**section, "took_s": round(time.perf_counter() - start, 1)}
        unfinished = arguments.out.with_suffix(".partial")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        unfinished.replace(arguments.out)
    print(f"{'all numbers right' if check.is_right else 'WRONG NUMBERS'}; results in {arguments.out}")
    return 0 if check.is_right else 1


class Check:
    """The device, and what has been found so far."""

    def __init__(self, device: torch.device, seconds: float, budget_s: float, is_small: bool) -> None:
        self.device = device
        self.seconds = seconds
        self.end = time.perf_counter() + budget_s
        self.is_small = is_small
        self.is_right = True
        self.ours = "cuda" if device.type == "cuda" else "cpu"
        self.backends = [self.ours, "chunked"]
        if device.type == "cuda":
            with forced("mamba_ssm"):
                try:
                    backend("bi_scan", device, torch.bfloat16)
                    self.backends.append("mamba_ssm")
                except KernelError as error:
                    print(f"without mamba-ssm: {error}")

    def has_time(self, name: str) -> bool:
        """Return whether a figure of this backend may still be taken."""
        return time.perf_counter() < self.end - (0 if name == self.ours else OWN_SECONDS)

    def machine(self) -> dict[str, Any]:
        """Name what the figures were taken on."""
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        found: dict[str, Any] = {
            "commit": commit.stdout.strip() or "unknown",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernels": cuda_library.describe(),
        }
        if self.device.type == "cuda":
            about = torch.cuda.get_device_properties(self.device)
            found |= {
                "gpu": about.name,
                "multiprocessors": about.multi_processor_count,
                "memory_gib": round(about.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
                "driver": _query("driver_version"),
                "clock_mhz": _query("clocks.max.sm"),
            }
        return found

    def time_ms(self, run: Callable[[], object]) -> dict[str, float]:
        """Return median, least and spread of the device's time for ``run``."""
        begin = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # what takes seconds is not the kernels' doing, and its spread is small beside the ratio
        least = 3 if time.perf_counter() - begin < 2 else 2
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < least or (time.perf_counter() - begin < self.seconds and len(times) < 200):
            times.append(self._once_ms(run))
        quartiles = statistics.quantiles(times, n=4)
        return {
            "median_ms": statistics.median(times),
            "least_ms": min(times),
            "spread_ms": quartiles[2] - quartiles[0],
            "runs": len(times),
        }

    def _once_ms(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1]))

    def floor_ms(self, batch: int, length: int, channels: int) -> float | None:
        """Return how long the exponentials of both directions' forward scans take by themselves."""
        if self.device.type != "cuda":
            return None
        clock = float(_query("clocks.max.sm") or 0) * 1e6
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        per_second = EXPONENTIALS_PER_CLOCK * multiprocessors * clock
        return 2e3 * batch * length * channels * EXPONENTIALS / per_second if clock else None


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Let one backend serve."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def draw(
    check: Check, batch: int, length: int, channels: int, states: int, dtype: torch.dtype, rank: int = 0
) -> list[Any]:
    """Return the arguments of ``vlm::bi_scan`` up to the segments; with a rank, delta as rows and weights."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=check.device).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    u_f, u_b, z = (normal(batch, length, channels) for _ in range(3))
    delta_f, delta_b = (normal(batch, length, rank or channels) for _ in range(2))
    bc_f, bc_b = (normal(batch, length, 2 * states) for _ in range(2))
    rates = -torch.arange(1.0, states + 1, device=check.device).repeat(channels, 1)
    parameters = [rates, rates * 0.9, *(torch.randn(channels, device=check.device) for _ in range(4))]
    weights = [normal(channels, rank) / rank**0.5 if rank else None for _ in range(2)]
    return [u_f, u_b, z, delta_f, delta_b, bc_f, bc_b, *(p.to(wide) for p in parameters), *weights, None]


def run_scan(arguments: list[Any], dout: Tensor | None) -> list[Tensor]:
    """Return the operator's output and, with ``dout``, all gradients."""
    if dout is None:
        return [torch.ops.vlm.bi_scan(*arguments, False)[0]]
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments[:-1]]
    out = torch.ops.vlm.bi_scan(*leaves, arguments[-1], True)[0]
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]


def correctness(check: Check) -> dict[str, Any]:
    """Compare with fp64, and with itself."""
    rows: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        worst = {"output": 0.0, "gradient": 0.0}
        cases = [(*case, 0) for case in (CHECKED[:5] if check.is_small else CHECKED)]
        for length, channels, rank, batch in CHECKED_RANKS[:1] if check.is_small else CHECKED_RANKS:
            cases.append((length, channels, 16, batch, rank))
        for length, channels, states, batch, rank in cases:
            arguments = draw(check, batch, length, channels, states, dtype, rank)
            dout = torch.randn(batch, length, channels, device=check.device).to(dtype)
            with forced(check.ours):
                found, again = run_scan(arguments, dout), run_scan(arguments, dout)
                plain = run_scan(arguments, None)
            with forced("chunked"):
                truth = run_scan([None if x is None else x.double() for x in arguments], dout.double())
            errors = [
                float((mine.double() - true).norm() / true.norm().clamp_min(1e-30))
                for mine, true in zip([plain[0], *found], [truth[0], *truth], strict=True)
            ]
            repeats = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
            worst["output"] = max(worst["output"], *errors[:2])
            worst["gradient"] = max(worst["gradient"], *errors[2:])
            within = max(errors[:2]) <= OUTPUT_LIMITS[name] and max(errors[2:]) <= GRADIENT_LIMITS[name]
            if not (within and repeats):
                check.is_right = False
                case = f"L{length} e{channels} n{states} b{batch} r{rank}"
                print(f"  WRONG {name} {case}: {errors}, repeats {repeats}")
        rows[name] = worst
        print(f"correctness {name}: output {worst['output']:.1e}, gradients {worst['gradient']:.1e}")
    return rows


def ceilings(check: Check) -> dict[str, Any]:
    """Measure copying and multiplying."""
    num_bytes = 2**24 if check.is_small else 2**30
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    size = 256 if check.is_small else 8192
    a = torch.randn(size, size, device=check.device, dtype=torch.bfloat16)
    copy = check.time_ms(lambda: target.copy_(source))
    product = check.time_ms(lambda: a @ a)
    rows = {
        "copy_tb_per_s": 2e-9 * num_bytes / copy["median_ms"],
        "bf16_tflop_per_s": 2e-9 * size**3 / product["median_ms"],
    }
    print(f"ceilings: {rows['copy_tb_per_s']:.2f} TB/s, {rows['bf16_tflop_per_s']:.0f} TFLOP/s")
    return rows


def scan(check: Check) -> dict[str, Any]:
    """Time the two scans of a block, with the products that give delta."""
    rows: dict[str, Any] = {}
    for size, (channels, rank, _) in SIZES.items():
        for batch, frames in LOADS:
            length = 1 + (4 if check.is_small else PLACES * frames)
            arguments = draw(
                check, 1 if check.is_small else batch, length, channels, 16, torch.bfloat16, rank
            )
            dout = torch.randn_like(arguments[0])
            with forced(check.ours):
                _, *kept = torch.ops.vlm.bi_scan(*arguments, True)
            key = f"{size} B{batch} T{frames}"
            rows[key] = _side_by_side(
                check,
                f"scan {key}",
                {
                    "forward": partial(run_scan, arguments, None),
                    "backward": partial(torch.ops.vlm.bi_scan_backward, dout, *arguments, *kept),
                },
            )
            floor = check.floor_ms(len(dout), length, channels)
            if floor and "median_ms" in rows[key]["forward"][check.ours]:
                rows[key]["floor_ms"] = floor
                share = floor / rows[key]["forward"][check.ours]["median_ms"]
                print(f"  forward reaches {100 * share:.0f} % of the exponentials' floor")
    return rows


def block(check: Check) -> dict[str, Any]:
    """Time one block with its norm and projections."""
    return _models(check, "block", depth=1)


def encoder(check: Check) -> dict[str, Any]:
    """Time whole encoders."""
    return _models(check, "encoder", depth=None)


def _models(check: Check, title: str, depth: int | None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for size, (_, _, name) in SIZES.items():
        for batch, frames in LOADS:
            side = 32 if check.is_small else 224
            settings: dict[str, Any] = {"num_frames": frames, "image_size": side}
            if depth or check.is_small:
                settings["depth"] = depth or 1
            model = VideoMamba(sized(name, **settings)).to(check.device)
            video = torch.randn(1 if check.is_small else batch, frames, 3, side, side, device=check.device)
            key = f"{size} B{batch} T{frames}"
            rows[key] = _side_by_side(check, f"{title} {key}", _jobs(model, video))
            del model
    return rows


def _jobs(model: VideoMamba, video: Tensor) -> dict[str, Callable[[], object]]:
    """Return inference and a training step's forward and backward, in bf16."""

    def forward() -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16):
            tokens: Tensor = model(video).tokens
        return tokens

    def inference() -> Tensor:
        with torch.inference_mode():
            return forward()

    def both() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(forward().float().square().mean())

    return {"forward": inference, "forward_backward": both}


def _side_by_side(check: Check, title: str, jobs: dict[str, Callable[[], object]]) -> dict[str, Any]:
    """Time every job on every backend; one that runs out of memory or time is said to, and left out."""
    row: dict[str, Any] = {}
    for job, run in jobs.items():
        row[job] = {}
        for name in check.backends:
            if not check.has_time(name):
                row[job][name] = {"error": "no time left"}
                continue
            try:
                with forced(name):
                    row[job][name] = check.time_ms(run)
            except torch.cuda.OutOfMemoryError:
                row[job][name] = {"error": "out of memory"}
                torch.cuda.empty_cache()
        ours = row[job][check.ours].get("median_ms")
        text = f"{title} {job}: " + (f"{ours:.3f} ms" if ours else row[job][check.ours]["error"])
        for name in check.backends[1:]:
            other = row[job][name].get("median_ms")
            if ours and other and check.is_right:
                text += f"; {name} {other:.3f} ms = {other / ours:.1f} x"
        print(text, flush=True)
    return row


def _query(field: str) -> str:
    """Ask nvidia-smi; empty if it is not there."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


SECTIONS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "correctness": correctness,
    "ceilings": ceilings,
    "scan": scan,
    "block": block,
    "encoder": encoder,
}

if __name__ == "__main__":
    sys.exit(main())
