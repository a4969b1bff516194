"""Measure a server under load: known texts, new ones, ten times as many clients, while clips are added."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FORMAT = "vlm-serving/1"
_EXAMPLE = "vlm eval serving --work /tmp/indexes --out serving.json"
_TINY = {
    "clips": 600, "dim": 32, "clients": 2, "seconds": 0.5, "overload_seconds": 0.5, "after_seconds": 1.0,
    "added": 256, "every": 0.3, "places": (2, 4),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Make an index, serve it in a process of its own, ask it, write what came of that."""
    parser = argparse.ArgumentParser(
        prog="vlm eval serving", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--clips", type=int, default=100_000, metavar="N", help="made-up clips of one segment (100000)")
    add("--dim", type=int, default=512, help="length of a vector (512)")
    add("--clients", type=int, default=16, metavar="N", help="clients that ask at once (16)")
    add("--seconds", type=float, default=60.0, help="how long they ask (60)")
    add(
        "--overload-seconds", type=float, default=10.0, metavar="S", help="how long ten times as many do (10)"
    )
    add("--after-seconds", type=float, default=6.0, metavar="S", help="how long recovery is watched (6)")
    add("--added", type=int, default=2560, metavar="N", help="clips added while clients ask (2560)")
    add("--every", type=float, default=1.0, metavar="S", help="seconds from one commit to the next (1)")
    add("--backend", choices=("auto", "exact", "faiss"), default="auto", help="how to search (auto)")
    add("--work", type=Path, metavar="DIR", help="keep the made-up index here; what is added stays in it")
    add("--tiny", action="store_true", help="a trial of seconds, to see that all of it works")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    parser.set_defaults(places=None)
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        vars(arguments).update(_TINY)
    if min(arguments.clips, arguments.dim, arguments.clients, arguments.added) < 1:
        parser.error("--clips, --dim, --clients and --added must be at least 1")
    with tempfile.TemporaryDirectory(prefix="vlm-serving-") as scratch:
        figures = _measure(arguments, arguments.work or Path(scratch), Path(scratch))
    content = json.dumps(figures, indent=1) + "\n"
    if arguments.out:
        from vlm.retrieval.durability import write_bytes_durably

        write_bytes_durably(arguments.out, content.encode())
    for name, is_kept in figures["kept"].items():
        print(f"{name:<22} {'kept' if is_kept else 'MISSED'}")
    return 0


def _measure(arguments: argparse.Namespace, work: Path, scratch: Path) -> dict[str, Any]:
    import torch  # for the machine's description

    from vlm.evaluation.speed import machine
    from vlm.evaluation.tradeoff.stored import store
    from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
    from vlm.serving.trial import phases
    from vlm.serving.trial.site import SHAPE, serving

    index = store(
        work / f"clips-{arguments.dim}-{arguments.clips}",
        SyntheticVectors(arguments.dim),
        arguments.clips,
        *SHAPE,
    )
    figures: dict[str, Any] = {"format": FORMAT, "limits": phases.LIMITS, "dim": arguments.dim}
    figures |= {"clips": len(index.snapshot.videos), "backend": arguments.backend}
    figures["machine"] = machine(torch.device("cpu"))
    with serving(index.folder, scratch / "cache", arguments.backend, arguments.places) as site:
        texts = phases.warm_up(site)
        figures["ordinary"] = phases.ordinary(site, texts, arguments.clients, arguments.seconds)
        _tell("ordinary", figures["ordinary"])
        figures["new texts"] = phases.ordinary(site, phases.NewTexts(), arguments.clients, arguments.seconds)
        _tell("new texts", figures["new texts"])
        texts = phases.warm_up(site)  # the new ones took their places
        figures["overload"] = phases.overload(
            site, texts, arguments.clients, arguments.overload_seconds, arguments.after_seconds
        )
        _tell("overload", figures["overload"])
        figures["ingest"] = phases.during_ingest(
            site, index.folder, texts, arguments.clients, arguments.added, arguments.every
        )
        _tell("ingest", figures["ingest"])
    figures["load_average_after"] = os.getloadavg()[0]
    figures["kept"] = phases.kept(figures)
    return figures


def _tell(name: str, figures: dict[str, Any]) -> None:
    print(
        f"{name:<9} {figures['clients']:>4} clients: {figures['requests_per_s']:.0f} requests/s, "
        f"p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms, {figures['errors']} not answered",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
