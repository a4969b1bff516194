"""Measure reranking from stored tokens: bytes, milliseconds and R@1, pooled beside full and beside none."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vlm.retrieval.durability import write_bytes_durably

FORMAT = "vlm-stored-tokens/1"
_SEED = 41
_EXAMPLE = "vlm eval stored_tokens --clips 200 --out tokens.json"


def main(argv: list[str]) -> int:
    """Index clips of the digit world three times, search for their captions, print and write."""
    parser = argparse.ArgumentParser(
        prog="vlm eval stored_tokens", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add(
        "--clips",
        type=int,
        default=200,
        metavar="N",
        help="clips of the digit world, their twins apart (200)",
    )
    add("--model", default="demo", metavar="SOURCE", help="what embeds and reranks (demo)")
    add("--rerank", type=int, default=16, metavar="K", help="segments that are reranked (16)")
    add("--work", type=Path, metavar="DIR", help="keep the clips here, and use those that are there")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="vlm-stored-tokens-") as scratch:
        figures = _measure(arguments, Path(scratch))
    if arguments.out:
        write_bytes_durably(arguments.out, json.dumps(figures, indent=1).encode() + b"\n")
    return 0


def _measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import torch

    from vlm.evaluation.speed import machine
    from vlm.evaluation.tradeoff.tokens import WAYS, measure_way
    from vlm.evaluation.world_manifest import read_manifest
    from vlm.models import load_model
    from vlm.world.clips import write_clips
    from vlm.world.sampling import gallery

    model = load_model(arguments.model)
    clips = (arguments.work or scratch) / f"clips-{arguments.clips}"
    manifest = write_clips(list(gallery("test", _SEED, arguments.clips, twins=True)), clips)
    texts = [(str(record["caption"]), str(record["file"])) for record in read_manifest(manifest)]
    files = [clips / name for _, name in texts]
    found: dict[str, Any] = {}
    print_row = "{:>7} {:>15} {:>13} {:>22} {:>17}".format
    print(print_row("tokens", "bytes/segment", "search, ms", "reranked, ms (95 %)", "R@1, reranked"))
    for way in WAYS:
        found[way] = measure_way(scratch / way, way, model, files, texts, arguments.rerank, {"batch_size": 8})
        found[way] |= {
            "recall_at_1": float(np.mean(found[way]["is_first"])),
            "recall_at_1_reranked": float(np.mean(found[way]["is_first_reranked"])),
        }
        row = found[way]
        again = row["reranked_ms"]
        print(
            print_row(
                way,
                row["bytes_per_segment"],
                f"{row['search_ms']['p50']:.1f}",
                f"{again['p50']:.1f} ({again['p95']:.1f})",
                f"{row['recall_at_1']:.3f}, {row['recall_at_1_reranked']:.3f}",
            ),
            flush=True,
        )
    lost = _difference(found["full"]["is_first_reranked"], found["pooled"]["is_first_reranked"])
    interval = f"{lost['value']:+.3f} [{lost['low']:+.3f}, {lost['high']:+.3f}]"
    print(f"pooled beside full tokens, R@1 reranked: {interval}")
    for row in found.values():
        del row["is_first"], row["is_first_reranked"]
    return {
        "format": FORMAT,
        "machine": machine(torch.device(str(model.device))),
        "settings": {"model": arguments.model, "rerank": arguments.rerank, "videos": len(files)},
        "ways": found,
        "pooled_minus_full": lost,
    }


def _difference(first: list[bool], second: list[bool]) -> dict[str, float]:
    """Return how much more often the second was right, with its 95 % interval over pairs of twins."""
    from vlm.metrics import paired_difference

    twins = np.arange(len(first)) // 2
    found = paired_difference(np.array(first, float), np.array(second, float), twins)
    return {"value": found.value, "low": found.low, "high": found.high}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
