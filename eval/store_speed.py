"""Time whole searches of a published store beside the index that it is of, on made-up vectors."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlm.evaluation.tradeoff.stored import SyntheticModel, store
from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
from vlm.retrieval.durability import write_bytes_durably
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.retrieval.searcher import Searcher
from vlm.retrieval.store.publishing import publish
from vlm.retrieval.store.searcher import StoreSearcher

FORMAT = "vlm-store-speed/1"
TOP_K = 10
_EXAMPLE = "vlm eval store_speed --sizes 100000 --work /tmp/indexes --out store.json"


def main(argv: list[str]) -> int:
    """Measure one size after another; each is written as it is done."""
    parser = argparse.ArgumentParser(
        prog="vlm eval store_speed", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=(10_000, 100_000, 1_000_000), metavar="N", help="segments")
    add("--dim", type=int, default=512, help="length of a vector (512)")
    add("--queries", type=int, default=50, metavar="N", help="texts asked (50)")
    add("--work", type=Path, metavar="DIR", help="keep the made-up indexes here, use those that are there")
    add("--to", metavar="URI", help="publish under this folder or URI, not beside the indexes")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    arguments = parser.parse_args(argv)
    figures: dict[str, Any] = {"format": FORMAT, "dim": arguments.dim, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="vlm-store-") as scratch:
        for size in arguments.sizes:
            found = figures["sizes"][str(size)] = _measure(arguments, arguments.work or Path(scratch), size)
            figures["machine"] = _machine()
            print(f"{size} segments, published in {found['published_s']:.1f} s")
            for name, one in found["searches"].items():
                print(f"  {name:<24} p50 {one['p50_ms']:8.1f} ms   p99 {one['p99_ms']:8.1f} ms", flush=True)
            if arguments.out:
                write_bytes_durably(arguments.out, (json.dumps(figures, indent=1) + "\n").encode())
    return 0


def _measure(arguments: argparse.Namespace, work: Path, size: int) -> dict[str, Any]:
    vectors = SyntheticVectors(arguments.dim)
    index = store(work / f"{arguments.dim}-{size}", vectors, size)
    model: Any = SyntheticModel(vectors, size)
    searchers: dict[str, SnapshotSearcher] = {"index": Searcher(index, model)}  # its structure is made here
    name = f"{arguments.dim}-{size}.store"
    uri = f"{arguments.to.rstrip('/')}/{name}" if arguments.to else str(work / name)
    begin = time.perf_counter()
    publish(index, uri)
    published_s, begin = time.perf_counter() - begin, time.perf_counter()
    opened = StoreSearcher(uri, model)
    opened_s = time.perf_counter() - begin
    if opened.index.state.structure is not None:
        searchers["store, by structure"] = opened
    searchers["store, every vector"] = StoreSearcher(uri, model, with_structure=False)
    queries = vectors.texts(arguments.queries, size)
    return {
        "published_s": published_s,
        "opened_s": opened_s,
        "same_hits_as_index": _share_of_same(searchers, queries[:10]),
        "searches": _in_turns(searchers, queries),
    }


def _share_of_same(searchers: dict[str, SnapshotSearcher], queries: np.ndarray) -> dict[str, float]:
    """Return the share of each searcher's hits that the index gives, too."""
    expected = [_found(searchers["index"], query) for query in queries]
    return {
        name: float(
            np.mean(
                [
                    len(hits & _found(searcher, query)) / TOP_K
                    for hits, query in zip(expected, queries, strict=True)
                ]
            )
        )
        for name, searcher in searchers.items()
    }


def _found(searcher: SnapshotSearcher, query: np.ndarray) -> set[tuple[str, float]]:
    hits = searcher.search(EncodedQuery(vector=query), top_k=TOP_K)
    return {(hit.video_id, hit.start_s) for hit in hits}


def _in_turns(searchers: dict[str, SnapshotSearcher], queries: np.ndarray) -> dict[str, dict[str, float]]:
    """Return how long whole searches for ten videos take, of queries that are encoded already."""
    taken: dict[str, list[float]] = {name: [] for name in searchers}
    for query in queries:
        for name, searcher in searchers.items():
            begin = time.perf_counter()
            searcher.search(EncodedQuery(vector=query), top_k=TOP_K)
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {"p50_ms": float(np.median(times)), "p99_ms": float(np.quantile(times, 0.99))}
        for name, times in taken.items()
    }


def _machine() -> dict[str, Any]:
    import faiss
    import lancedb
    import torch  # for the machine's description

    from vlm.evaluation.speed import machine

    found = {**machine(torch.device("cpu")), "load_average": os.getloadavg()[0]}
    return {**found, "faiss": faiss.__version__, "lancedb": lancedb.__version__}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
