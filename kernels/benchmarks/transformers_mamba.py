"""What one line gives a transformers Mamba model: python kernels/benchmarks/transformers_mamba.py.

A model with random weights computes the same logits with its own scan and after ``vlm.ops.patch()``, by turns
in one process; the ratio is of processor time at its least. Nothing is printed unless the logits agree.
"""

from __future__ import annotations

import argparse
import sys

import torch
from run import take_turns

from vlm.ops import patch, unpatch


def main(argv: list[str] | None = None) -> int:
    """Compare, then time forward, and forward with backward."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=512, help="tokens")
    parser.add_argument("--width", type=int, default=256, help="channels of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="least time spent on one measurement")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=1000, hidden_size=arguments.width, num_hidden_layers=arguments.layers, use_cache=False
    )
    model = MambaForCausalLM(config)
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
    size = f"{arguments.layers} layers of {arguments.width}, {arguments.length} tokens"
    print(f"{size}; relative difference of the logits {error:.0e}")
    for name, run in (("forward", forward), ("forward and backward", both)):
        patch()
        ours = min(take_turns({name: run}, arguments.seconds)[name])
        unpatch()
        theirs = min(take_turns({name: run}, arguments.seconds)[name])
        print(f"{name}: own scan {theirs:.0f} ms, with vlm.ops.patch() {ours:.0f} ms, {theirs / ours:.1f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
