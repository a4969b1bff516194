"""What one line gives a transformers Mamba model: python kernels/benchmarks/transformers_mamba.py [--out F].

A model with random weights computes the same logits with its own scan and after ``vlm.ops.patch()``, by turns
in one process, so that both meet the same disturbances; the ratio is the median over the pairs, of processor
time, which is all threads' time: one thread is the default. Nothing is printed unless the logits agree.

Without mamba-ssm the model's own scan is a loop in PyTorch that writes one step at a time; the backward pass
of such a loop grows with the square of the length, so its ratio belongs to one length only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import machine

from vlm.ops import patch, unpatch


def main(argv: list[str] | None = None) -> int:
    """Compare, then time forward, and forward with backward."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=512, help="tokens")
    parser.add_argument("--width", type=int, default=256, help="channels of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="least time spent on one ratio")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    import transformers

    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=1000, hidden_size=arguments.width, num_hidden_layers=arguments.layers, use_cache=False
    )
    model = transformers.MambaForCausalLM(config)
    ids = torch.randint(0, 1000, (1, arguments.length))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids).logits
            return logits

    def both() -> None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    own = forward()
    patch()
    error = float((forward() - own).norm() / own.norm())
    if not error < 1e-5:
        print(f"the logits differ by {error:.1e}; no ratio is worth printing", file=sys.stderr)
        return 1
    size = {"layers": arguments.layers, "width": arguments.width, "tokens": arguments.length}
    print(f"{size}; relative difference of the logits {error:.0e}")
    results: dict[str, Any] = {
        "machine": machine() | {"transformers": transformers.__version__},
        "model": size,
        "logits_relative_difference": error,
    }
    for name, run in (("forward", forward), ("forward_backward", both)):
        results[name] = row = by_turns(run, arguments.seconds)
        print(
            f"{name}: own scan {row['own_cpu_ms']:.0f} ms, with vlm.ops.patch() "
            f"{row['patched_cpu_ms']:.0f} ms, "
            f"{row['ratio']:.1f} x [{row['ratio_p20']:.1f}, {row['ratio_p80']:.1f}]"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def by_turns(run: Callable[[], object], seconds: float) -> dict[str, float]:
    """Time pairs, the model's own scan and ours in changing order, for ``seconds``, at least three pairs.

    Returns medians of processor time in milliseconds, and of the ratio of each pair with its 20th and 80th
    percentile.
    """
    pairs: list[dict[str, float]] = []
    for change in (unpatch, patch):
        change()
        run()
    begin = time.perf_counter()
    while len(pairs) < 3 or (time.perf_counter() - begin < seconds and len(pairs) < 200):
        pair = {}
        for name in ("own", "patched") if len(pairs) % 2 else ("patched", "own"):
            patch() if name == "patched" else unpatch()
            start = time.process_time()
            run()
            pair[name] = 1e3 * (time.process_time() - start)
        pairs.append(pair)
    ratios = [pair["own"] / pair["patched"] for pair in pairs]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return {
        "own_cpu_ms": statistics.median(pair["own"] for pair in pairs),
        "patched_cpu_ms": statistics.median(pair["patched"] for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratio_p20": fifths[0],
        "ratio_p80": fifths[3],
        "pairs": len(pairs),
    }


if __name__ == "__main__":
    sys.exit(main())
