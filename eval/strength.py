"""Measure the grades of hits: how often a caption finds a strong one, of what is there and of what is not."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vlm.retrieval.durability import write_bytes_durably

FORMAT = "vlm-strength/1"
_EXAMPLE = "vlm eval strength --out strength.json"


def main(argv: list[str]) -> int:
    """Leave things out of indexes of the digit world, search for what is there and what is not."""
    parser = argparse.ArgumentParser(
        prog="vlm eval strength", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--model", default="demo", metavar="SOURCE", help="what embeds and reranks (demo)")
    add("--split", default="test", choices=("val", "test", "combo"), help="of the digit world (test)")
    add("--seed", type=int, default=1, metavar="N", help="which scenes (1)")
    add("--count", type=int, default=400, metavar="N", help="scenes drawn (400)")
    add("--left-out", type=int, nargs="+", default=[10, 20, 30, 40], metavar="N", help="things left out")
    add("--choices", type=int, default=2, metavar="N", help="ways to choose them, of each number (2)")
    add("--rerank", type=int, default=16, metavar="K", help="segments that are reranked (16)")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="vlm-strength-") as scratch:
        figures = _measure(arguments, Path(scratch))
    if arguments.out:
        write_bytes_durably(arguments.out, json.dumps(figures, indent=1).encode() + b"\n")
    return 0


def _measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import torch

    from vlm.evaluation.speed import machine
    from vlm.evaluation.tradeoff.absent import divide, index_scenes, share_strong
    from vlm.models import load_model

    model = load_model(arguments.model)
    print_row = "{:>8} {:>6} {:>8} {:>7} {:>16} {:>16} {:>16} {:>16}".format
    depth = f"@{arguments.rerank}"
    print(
        print_row(
            "left out",
            "choice",
            "present",
            "absent",
            *(f"{a}{b}" for b in ("", depth) for a in ("present", "absent")),
        )
    )
    rows = []
    for left_out in arguments.left_out:
        for choice in range(arguments.choices):
            divided = divide(
                arguments.split, arguments.seed, arguments.count, num_absent=left_out, choice=choice
            )
            searcher = index_scenes(scratch / f"{left_out}-{choice}", model, divided.present)
            row = {
                "left_out": left_out,
                "choice": choice,
                "num_present": len(divided.present),
                "num_absent": len(divided.absent),
            }
            for name, rerank in (("itc", 0), ("reranked", arguments.rerank)):
                for side, scenes in (("present", divided.present), ("absent", divided.absent)):
                    row[f"{side}_strong_{name}"] = share_strong(searcher, scenes, rerank)
            rows.append(row)
            shares = (f"{100 * row[key]:.1f} %" for key in row if "strong" in key)
            print(print_row(left_out, choice, row["num_present"], row["num_absent"], *shares), flush=True)
    settings = {name: getattr(arguments, name) for name in ("model", "split", "seed", "count", "rerank")}
    return {
        "format": FORMAT,
        "machine": machine(torch.device(str(model.device))),
        "settings": settings,
        "fingerprint": model.fingerprint,
        "divisions": rows,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
