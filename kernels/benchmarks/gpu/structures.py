"""Search structures made with the GPU's help: as good as the CPU's, exact where exact, how much sooner."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from gpu.session import Figures, Session

# the structures differ by rounding, and what is found by luck
_RECALL_SLACK = 0.02


def structures(session: Session) -> Figures:
    """Train and fill lists with and without the GPU, and search exactly by its products."""
    try:
        import faiss  # noqa: F401

        from vlm.retrieval.backends.faiss import Gpu, count_gpus
    except ImportError as error:
        print(f"structures: left out: {error}", flush=True)
        return {"left_out": str(error)}
    num_gpus = count_gpus() if session.device.is_gpu else 0
    if session.device.is_gpu and not num_gpus:
        print("structures: left out: this build of FAISS finds no GPU", flush=True)
        return {"left_out": "this build of FAISS finds no GPU"}
    rows = _Rows(3_000, 32) if session.is_small else _Rows(200_000, 512)
    found: Figures = {"num_gpus": num_gpus, "rows": rows.num_rows, "dim": rows.dim}
    truth = _exactly(rows, None)
    found["cpu"] = _made(rows, None, truth)
    if not num_gpus:
        return found
    gpu = Gpu()
    _made(_Rows(3_000, rows.dim), gpu, None)  # what is loaded once is not counted
    found["gpu"] = _made(rows, gpu, truth)
    begin = time.perf_counter()
    scores, hits = _exactly(rows, gpu)
    found["gpu"]["exact_s"] = time.perf_counter() - begin
    found["gpu"]["product_error"] = _product_error(rows, gpu)
    found["failure"] = gpu.failure
    if gpu.failure:
        session.is_broken = True
        print(f"structures: the GPU failed: {gpu.failure}", flush=True)
    if found["gpu"]["product_error"] > 1:
        session.wrong("structures: the GPU's products are rounded more than float32 rounds them")
    if not (np.array_equal(hits, truth[1]) and np.array_equal(scores, truth[0])):
        session.wrong("structures: exact search by the GPU's products gives other hits")
    if found["gpu"]["recall_at_10"] < found["cpu"]["recall_at_10"] - _RECALL_SLACK:
        session.wrong(f"structures: recall {found['gpu']['recall_at_10']} on the GPU")
    for name in ("cpu", "gpu"):
        print(f"structures {name}: {found[name]}", flush=True)
    return found


class _Rows:
    """Clustered vectors, as many as asked, with some of them as queries."""

    def __init__(self, num_rows: int, dim: int) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((num_rows // 50, dim)).astype(np.float32)
        self.vectors = np.empty((num_rows, dim), np.float16)
        for first in range(0, num_rows, 10_000):
            part = self.vectors[first : first + 10_000]
            noise = 0.5 * rng.standard_normal(part.shape, np.float32)
            part[:] = centres[rng.integers(len(centres), size=len(part))] + noise
        self.num_rows, self.dim, self.key = num_rows, dim, "rows"
        self.queries = self.vectors[rng.integers(num_rows, size=100)].astype(np.float32)
        self.queries += 0.3 * rng.standard_normal(self.queries.shape, np.float32)

    def prefix_key(self, _num_rows: int) -> None:
        """No part has a key of its own."""

    def blocks(self, max_rows: int, first: int = 0) -> Any:
        """Yield blocks with their first rows."""
        for start in range(first, self.num_rows, max_rows):
            yield start, self.vectors[start : start + max_rows]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return some rows."""
        gathered: np.ndarray = self.vectors[rows]
        return gathered


def _exactly(rows: _Rows, gpu: Any) -> tuple[np.ndarray, np.ndarray]:
    from vlm.retrieval.backends.exact import ExactBackend

    return ExactBackend(rows, None if gpu is None else gpu.product).search(rows.queries, 10)


def _product_error(rows: _Rows, gpu: Any) -> float:
    """Return the largest error of the GPU's products, as a share of what exact search allows for."""
    from vlm.retrieval.backends.exact import tolerance

    values = rows.vectors[:4_096].astype(np.float32)
    error = np.abs(
        gpu.product(rows.queries, values) - rows.queries.astype(np.float64) @ values.T.astype(np.float64)
    )
    allowed = tolerance(rows.queries, float(np.linalg.norm(values, axis=1).max()))
    return float((error.max(axis=1) / allowed).max())


def _made(rows: _Rows, gpu: Any, truth: tuple[np.ndarray, np.ndarray] | None) -> Figures:
    """Return seconds of training and filling, and what an eighth of the lists and 1,000 candidates find."""
    from vlm.retrieval.backends.faiss import Structure
    from vlm.retrieval.backends.plan import plan_for

    plan = plan_for(rows.num_rows, rows.dim, "lists")
    begin = time.perf_counter()
    structure = Structure.train(plan, rows.dim, rows.vectors[:100_000].astype(np.float32), gpu)
    train_s, begin = time.perf_counter() - begin, time.perf_counter()
    for _, block in rows.blocks(16_384):
        structure.add(block.astype(np.float32), gpu)
    made: Figures = {"train_s": train_s, "add_s": time.perf_counter() - begin}
    if truth is not None:
        depth, breadth = min(1_000, rows.num_rows), max(1, plan.num_lists // 8)
        _, candidates = structure.nearest(rows.queries, depth, breadth)
        pairs = zip(candidates, truth[1], strict=True)
        made["recall_at_10"] = float(np.mean([np.isin(best, own).mean() for own, best in pairs]))
    return made
