"""Measure what the index's search structures trade: recall, time and bytes, beside plain FAISS."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm.evaluation.tradeoff.stored import SyntheticModel, store
from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
from vlm.retrieval.backends.exact import ExactBackend
from vlm.retrieval.backends.structured import FaissBackend
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.searcher import Searcher

FORMAT = "vlm-index-tradeoff/1"
LIMITS = {
    "end_to_end_ms": 30.0,
    "recall": 0.95,
    "bytes_per_vector": 80.0,
    "overhead_ms": 1.0,
    "overhead": 0.1,
}
SIZES = (10_000, 100_000, 1_000_000)
TOP_K = 10
# a graph or a full scan of more rows takes too long to build or to ask
MOST_ROWS = {"flat": 1_000_000, "hnsw": 100_000}
FILTER_SHARES = (0.5, 0.1, 0.03, 0.01, 0.001)
RIVALS = ("flat", "hnsw", "ivf-pq", "ivf-rabitq")
RIVAL_RECALL = 0.95
_EXAMPLE = "vlm eval index_tradeoff --work /tmp/indexes --resume --out tradeoff.json"

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def main(argv: list[str]) -> int:
    """Measure one size after another; each is written as it is done."""
    parser = argparse.ArgumentParser(
        prog="vlm eval index_tradeoff", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="numbers of vectors (1e4 1e5 1e6)")
    add("--dim", type=int, default=512, help="length of a vector (512)")
    add("--queries", type=int, default=200, metavar="N", help="texts asked (200)")
    add("--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="plain FAISS structures to measure (all)")
    add("--threads", type=int, default=2, help="threads of FAISS (2)")
    add(
        "--work", type=Path, metavar="DIR", help="keep the made-up indexes here, and use those that are there"
    )
    add("--resume", action="store_true", help="leave out what --out holds already")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    arguments = parser.parse_args(argv)
    earlier = _earlier(arguments) if arguments.resume else {}
    figures = {"format": FORMAT, "limits": LIMITS, "dim": arguments.dim, "sizes": earlier}
    with tempfile.TemporaryDirectory(prefix="vlm-tradeoff-") as scratch:
        for size in arguments.sizes:
            entry = figures["sizes"].setdefault(str(size), {})
            for name, figure in _measure(arguments, arguments.work or Path(scratch), size, entry):
                entry[name] = figure
                print(f"{size:>9} {name:<12} {_line(name, figure)}", flush=True)
                if arguments.out:
                    _write(arguments.out, figures)
    return 0


def _measure(arguments: argparse.Namespace, work: Path, size: int, done: dict[str, Any]) -> Any:
    """Yield (name, figures) of what is not done yet of one size."""
    import faiss

    faiss.omp_set_num_threads(arguments.threads)
    vectors = SyntheticVectors(arguments.dim)
    wanted = [name for name in arguments.rivals if size <= MOST_ROWS.get(name, size) and name not in done]
    if not wanted and {"ours", "filtered"} <= set(done):
        return
    index = store(work / f"{arguments.dim}-{size}", vectors, size)
    log = index.vectors()
    queries = vectors.texts(arguments.queries, size)
    # ten videos may need many segments
    truth = ExactBackend(log).search(queries, 400)
    if "data" not in done:
        yield "data", {**_difficulty(queries, truth, log), "machine": _machine(arguments.threads)}
    rows = np.concatenate([block for _, block in log.blocks(65_536)])
    if "ours" not in done:
        yield "ours", _ours(index, SyntheticModel(vectors, size), queries, truth, rows)
    if "filtered" not in done:
        yield "filtered", _filtered(index, SyntheticModel(vectors, size), queries[:50])
    for name in wanted:
        yield name, _rival(name, rows, queries, truth)
        gc.collect()


def _difficulty(queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray], log: Any) -> dict[str, Any]:
    """Return how the queries lie to what is stored, as cosines."""
    sample = log.gather(np.random.default_rng(0).integers(log.num_rows, size=500)).astype(np.float32)
    background = queries @ sample.T
    return {
        "queries": len(queries),
        "cosine_of_best": float(truth[0][:, 0].mean()),
        "cosine_of_10th": float(truth[0][:, 9].mean()),
        "cosine_of_others": [float(background.mean()), float(background.std())],
    }


def _ours(
    index: VideoIndex, model: Any, queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray], rows: np.ndarray
) -> dict[str, Any]:
    begin = time.perf_counter()
    searcher = Searcher(index, model, backend="faiss")
    built_s = time.perf_counter() - begin
    backend = searcher._backend
    assert isinstance(backend, FaissBackend)
    for _, block in searcher._vectors.blocks(65_536):
        block[:, 0].sum()  # the plain search has every row in memory: here every page is mapped
    figures: dict[str, Any] = {"kind": backend.plan.kind, "breadth": backend.plan.breadth}
    figures |= {"depth": backend.plan.depth, "opened_s": built_s}
    figures["bytes_per_vector"] = (index.folder / "ann" / "structure.faiss").stat().st_size / len(rows)
    figures["stated_recall"] = {recall.queries: recall.recall_at_10 for recall in backend.label.recalls}
    figures |= _recall(backend.search, queries, truth)
    figures |= _beside_raw(index, backend, queries, rows)
    figures["end_to_end"] = _end_to_end(searcher, queries, truth)
    return figures


def _filtered(index: VideoIndex, model: Any, queries: np.ndarray) -> dict[str, Any]:
    """Return recall and time where only a share of the videos is allowed, drawn at random."""
    searcher = Searcher(index, model, backend="faiss")
    owners, figures = index.snapshot.row_video, {}
    for share in FILTER_SHARES:
        kept = np.random.default_rng(2).random(int(owners.max()) + 1) < share
        allowed = kept[owners]
        truth = ExactBackend(index.vectors()).search(queries, TOP_K, allowed)

        def search(part: np.ndarray, top_k: int, allowed: np.ndarray = allowed) -> Any:
            return searcher._backend.search(part, top_k, allowed)

        figures[f"{share:g}"] = _alone(search, queries, truth)
    return figures


def _beside_raw(
    index: VideoIndex, backend: FaissBackend, queries: np.ndarray, rows: np.ndarray
) -> dict[str, Any]:
    """Time our backend and plain FAISS on the very same structure, query by query in turns."""
    import faiss

    raw: Any = faiss.read_index(str(index.folder / "ann" / "structure.faiss"))
    depth = min(len(rows), backend.plan.depth + 4 * TOP_K)
    if backend.plan.kind == "flat":
        plain = _flat_search(raw)
    else:
        raw.nprobe = backend.plan.breadth
        plain = _rescored(raw, rows, depth)
    return _in_turns({"ours": backend.search, "faiss": plain}, queries)


def _in_turns(searches: dict[str, Search], queries: np.ndarray) -> dict[str, Any]:
    """Return p50 and p99 of each search by each clock, of one query at a time, and our overhead."""
    clocks = {name: np.empty((len(queries), 2)) for name in searches}
    order = list(searches)
    for search in searches.values():
        for query in queries[:10]:
            search(query[None], TOP_K)
    for number, query in enumerate(queries):
        # who comes second finds the rows in the processor's cache
        for name in order if number % 2 else order[::-1]:
            begin, begin_processor = time.perf_counter(), time.process_time()
            searches[name](query[None], TOP_K)
            clocks[name][number] = time.perf_counter() - begin, time.process_time() - begin_processor
    figures: dict[str, Any] = {"one_query": {name: _times(1e3 * taken) for name, taken in clocks.items()}}
    medians = {name: np.median(1e3 * taken, axis=0) for name, taken in clocks.items()}
    for place, clock in enumerate(("wall", "processor")):
        ours, plain = float(medians["ours"][place]), float(medians["faiss"][place])
        figures[f"overhead_{clock}"] = {"ms": ours - plain, "ratio": ours / plain}
    return figures


def _times(taken_ms: np.ndarray) -> dict[str, float]:
    wall, processor = taken_ms.T
    return {
        "p50_ms": float(np.median(wall)),
        "p99_ms": float(np.quantile(wall, 0.99)),
        "processor_p50_ms": float(np.median(processor)),
        "queries_per_s": 1e3 / float(wall.mean()),
    }


def _end_to_end(
    searcher: Searcher, queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Time whole searches for ten videos, of a query that is encoded already, and look at their hits."""
    encoded = [EncodedQuery(vector=query) for query in queries]
    for query in encoded[:10]:
        searcher.search(query, top_k=TOP_K)
    taken, metadata, shares = np.empty((len(queries), 2)), np.empty(len(queries)), []
    owners = searcher.index.snapshot.row_video
    inside = _Stopwatch(searcher._backend)
    searcher._backend = inside
    for number, query in enumerate(encoded):
        inside.seconds = 0.0
        begin, begin_processor = time.perf_counter(), time.process_time()
        hits = searcher.search(query, top_k=TOP_K)
        taken[number] = time.perf_counter() - begin, time.process_time() - begin_processor
        metadata[number] = taken[number][0] - inside.seconds
        best = list(dict.fromkeys(owners[truth[1][number]].tolist()))[:TOP_K]
        names = {searcher.index.snapshot.videos[video].video_id for video in best}
        shares.append(len(names & {hit.video_id for hit in hits}) / max(1, len(best)))
    return {
        **_times(1e3 * taken),
        "metadata_p50_ms": 1e3 * float(np.median(metadata)),
        "video_recall_at_10": float(np.mean(shares)),
    }


class _Stopwatch:
    """A backend that knows how long it was asked."""

    name = "faiss"
    shares_passes = False

    def __init__(self, backend: Any) -> None:
        self._backend, self.seconds = backend, 0.0

    def search(self, *query: Any) -> Any:
        begin = time.perf_counter()
        found = self._backend.search(*query)
        self.seconds += time.perf_counter() - begin
        return found


def _recall(search: Search, queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    found = search(queries, TOP_K)[1]
    # by row: plain FAISS rounds scores differently
    pairs = zip(found, truth[1][:, :TOP_K], strict=True)
    shares = [len(set(mine.tolist()) & set(best.tolist())) / len(set(best.tolist())) for mine, best in pairs]
    begin = time.perf_counter()
    search(queries, TOP_K)
    return {
        "recall_at_10": float(np.mean(shares)),
        "batch_queries_per_s": len(queries) / (time.perf_counter() - begin),
    }


def _rival(
    name: str, rows: np.ndarray, queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Build a plain structure and look as far as it must for the recall that is asked of ours."""
    import faiss

    size, dim = rows.shape
    lists = 2 ** round(np.log2(np.sqrt(size)))
    factory = {"flat": "Flat", "hnsw": "HNSW32,SQfp16", "ivf-pq": f"IVF{lists},PQ{dim // 8}",
               "ivf-rabitq": f"IVF{lists},RaBitQ"}[name]  # fmt: skip
    index: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    begin = time.perf_counter()
    if not index.is_trained:
        chosen = np.sort(np.random.default_rng(0).choice(size, min(size, 50_000), replace=False))
        index.train(rows[chosen].astype(np.float32))
    for first in range(0, size, 16_384):
        index.add(rows[first : first + 16_384].astype(np.float32))
    figures = {"factory": factory, "built_s": time.perf_counter() - begin}
    figures["bytes_per_vector"] = len(faiss.serialize_index(index)) / size
    if name == "flat":
        return {**figures, **_alone(_flat_search(index), queries, truth)}
    for breadth in 2 ** np.arange(4, 13):
        if name == "hnsw":
            index.hnsw.efSearch, depth = int(breadth), min(int(breadth), size)
        else:
            index.nprobe, depth = int(min(breadth, lists)), min(500, size)
        search = _rescored(index, rows, depth)
        found = {"breadth": int(breadth), "depth": depth, **_recall(search, queries, truth)}
        if found["recall_at_10"] >= RIVAL_RECALL or (name != "hnsw" and breadth >= lists):
            break
    return {**figures, **found, **_alone(search, queries, truth)}


def _alone(search: Search, queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    some = queries[:100]
    taken = np.empty((len(some), 2))
    for number, query in enumerate(some):
        begin, begin_processor = time.perf_counter(), time.process_time()
        search(query[None], TOP_K)
        taken[number] = time.perf_counter() - begin, time.process_time() - begin_processor
    recall = _recall(search, queries, truth)
    return {**recall, "one_query": {"faiss": _times(1e3 * taken)}}


def _flat_search(index: Any) -> Search:
    return lambda queries, top_k: index.search(queries, top_k)


def _rescored(index: Any, rows: np.ndarray, depth: int) -> Search:
    """Plain FAISS, its candidates scored again by the stored float16 vectors: what the backend is held to."""

    def search(queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, found = np.empty((len(queries), top_k), np.float32), np.empty((len(queries), top_k), np.int64)
        for number, candidates in enumerate(index.search(queries, depth)[1]):
            exact = np.einsum("rd,d->r", rows[candidates].astype(np.float32), queries[number])
            exact[candidates < 0] = -np.inf
            best = np.argsort(-exact)[:top_k]
            scores[number], found[number] = exact[best], candidates[best]
        return scores, found

    return search


def _machine(threads: int) -> dict[str, Any]:
    import faiss
    import torch  # for the machine's description

    from vlm.evaluation.speed import machine

    found = {**machine(torch.device("cpu")), "threads": threads}
    return {**found, "load_average": os.getloadavg()[0], "faiss": faiss.__version__, "numpy": np.__version__}


def _earlier(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that an earlier run has measured, in whole or in part."""
    if arguments.out is None or not arguments.out.exists():
        return {}
    figures = json.loads(arguments.out.read_text(encoding="utf-8"))
    matches = (figures["format"], figures["dim"]) == (FORMAT, arguments.dim)
    sizes: dict[str, Any] = figures["sizes"] if matches else {}
    return sizes


def _write(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _line(name: str, figure: dict[str, Any]) -> str:
    if name == "data":
        return f"cosine of the best {figure['cosine_of_best']:.3f}, 10th {figure['cosine_of_10th']:.3f}"
    if name == "filtered":
        shares = [
            (share, entry["recall_at_10"], entry["one_query"]["faiss"]) for share, entry in figure.items()
        ]
        return "; ".join(
            f"{share}: recall {recall:.3f}, p50 {ms['p50_ms']:.1f} ms" for share, recall, ms in shares
        )
    parts = [f"recall {figure['recall_at_10']:.3f}", f"{figure['bytes_per_vector']:.1f} bytes"]
    parts += [
        f"{who} p50 {times['p50_ms']:.2f} ms, p99 {times['p99_ms']:.2f}"
        for who, times in figure["one_query"].items()
    ]
    if name == "ours":
        parts.append(f"whole search {figure['end_to_end']['p50_ms']:.2f} ms")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
