"""Prove and time the CUDA kernels on the GPU at hand: python kernels/benchmarks/gpu_check.py --out FILE.

Needs torch, numpy and einops, an NVRTC, no network. The sections run in order, and the JSON is written after
each, so that an interrupted check keeps what it found. ``--only`` runs some of them.

  prepare      compiles everything                      correctness  every operator against fp64
  ceilings     what this GPU copies and multiplies      conv, norm   beside PyTorch and their bytes
  official     admits mamba-ssm as the rival, if ``--official`` names its sources and they build
  scan, block, encoder                                  both passes, beside the rival
  launches     the host's time, launches of a block     graphs       recorded encoders of one clip
  polynomial   shares of exponentials                   tf32         fp32 with products in tf32
  memory       of a training step                       decoding     of clips, beside the CPU (needs PyAV)
  structures   of search, made with its help (needs a FAISS with GPUs)

Exit code 1 if a number is wrong or something of ours broke; ratios are printed only where all were right. The
whole ends within ``--minutes``: every section has a share of them, and comparisons are what is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a GPU machine may hold a checkout and nothing installed

from gpu import correctness, decoding, launches, models, operators, prepare, rival, structures, tuning  # noqa: E402
from gpu.build import Build  # noqa: E402
from gpu.device import Device  # noqa: E402
from gpu.session import Figures, Session  # noqa: E402
from gpu.table import table  # noqa: E402

from vlm.ops.cuda import library as cuda_library  # noqa: E402

# what runs, and its share of the time
SECTIONS: dict[str, tuple[Callable[[Session], Figures], float]] = {
    "prepare": (prepare.prepare, 2),
    "correctness": (correctness.correctness, 4),
    "ceilings": (operators.ceilings, 0.2),
    "conv": (operators.conv, 0.7),
    "norm": (operators.norm, 0.7),
    "official": (rival.admit, 3),
    "scan": (operators.scan, 3),
    "block": (models.block, 3),
    "encoder": (models.encoder, 5),
    "launches": (launches.launches, 0.5),
    "graphs": (models.graphs, 1),
    "polynomial": (tuning.polynomial, 1),
    "tf32": (tuning.tf32, 1),
    "memory": (models.memory, 1),
    "decoding": (decoding.decoding, 2),
    "structures": (structures.structures, 1),
}


def main(argv: list[str] | None = None) -> int:
    """Run the sections, print a line for each figure, write the JSON, print the table."""
    arguments = _parsed(argv)
    device = Device(torch.device(arguments.device))
    build = None
    if arguments.official and "official" in arguments.only:
        build = Build(arguments.official, arguments.out.parent / "official", device.architecture())
    session = Session(
        device,
        arguments.backend or ("cuda" if arguments.device.startswith("cuda") else "cpu"),
        seconds=arguments.seconds,
        budget_s=60 * arguments.minutes,
        is_small=arguments.small,
        build=build,
    )
    results: dict[str, Any] = {"machine": _machine(session), "sections": {}}
    broken = []
    try:
        for name in session.shared_out(arguments.only, lambda name: SECTIONS[name][1]):
            start = time.perf_counter()
            try:
                section = {"error": "no time left"} if session.is_over else SECTIONS[name][0](session)
            except Exception as error:  # whatever breaks one section, the others still have time
                section = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
                broken.append(name)
                session.is_right &= name != "correctness"
                print(f"{name} BROKE: {section['error']}", flush=True)
            results["sections"][name] = {**section, "took_s": round(time.perf_counter() - start, 1)}
            results["is_right"] = session.is_right
            _write(arguments.out, results)
    finally:
        if build is not None:
            build.stop()
    print("\n".join(table(results["sections"], session.ours)))
    verdict = "all numbers right" if session.is_right else "WRONG NUMBERS"
    print(f"{verdict}{', broken: ' + ', '.join(broken) if broken else ''}; results in {arguments.out}")
    return 0 if session.is_right and not session.is_broken and not broken else 1


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="where the results go")
    parser.add_argument(
        "--only", type=_sections, default=list(SECTIONS), metavar="SECTION[,SECTION]", help="only these"
    )
    parser.add_argument("--official", type=Path, help="folder of the unpacked sources of mamba-ssm")
    parser.add_argument("--device", default="cuda", help="cpu proves the program, not the kernels")
    parser.add_argument("--backend", help="what is checked: cuda on a GPU, else cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="least time spent on one measurement")
    parser.add_argument("--minutes", type=float, default=8.5, help="most time spent on the whole")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that the program runs")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU answers; --device cpu --small shows that the program runs")
    return arguments


def _sections(names: str) -> list[str]:
    """Return sections in their order."""
    asked = names.split(",")
    if unknown := [name for name in asked if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def _machine(session: Session) -> dict[str, Any]:
    """Name what the figures were taken on."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": cuda_library.describe(),
        **session.device.describe(),
    }


def _write(out: Path, results: dict[str, Any]) -> None:
    unfinished = out.with_suffix(".partial")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(out)


if __name__ == "__main__":
    sys.exit(main())
