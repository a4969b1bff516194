"""FAISS's structures: trained, filled, asked for candidates, turned into bytes. Only this imports it.

Nothing here is exact or durable: scores are settled by the definition of the exact backend, bytes are kept by
`cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from vlm.retrieval.backends.plan import Plan

_KMEANS_ROUNDS = 10


class Gpu:
    """A GPU that helps to make structures until it fails; what comes of it lives on the CPU like any other.

    It finds the nearest centre of lists, in training and when vectors are added. Codes of 4 bits have no form
    on a GPU, so searching stays where it is.

    Attributes:
        failure: Why it does not help any more; empty while it does.
    """

    def __init__(self) -> None:
        self._resources: Any = faiss.StandardGpuResources()
        self.failure = ""

    def help(self, lists: Any, part: str, index: Any, run: Callable[[], None]) -> None:
        """Run something while a part of lists is an index on the GPU, and again without if that fails."""
        if not self.failure:
            own, num_rows = getattr(lists, part), lists.ntotal
            try:
                lent = faiss.index_cpu_to_gpu(self._resources, 0, index)
                setattr(lists, part, lent)
                run()
                return
            except RuntimeError as error:  # mostly memory
                if lists.ntotal != num_rows:
                    raise
                self.failure = _first_line(error)
            finally:
                setattr(lists, part, own)
        run()

    def product(self, queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return the float32 inner products (queries, rows) of float32 queries and vectors."""
        if not self.failure:
            try:
                scores: np.ndarray = faiss.pairwise_distance_gpu(
                    self._resources, queries, vectors, metric=faiss.METRIC_INNER_PRODUCT, device=0
                )
                return scores
            except RuntimeError as error:
                self.failure = _first_line(error)
        product: np.ndarray = queries @ vectors.T
        return product


def count_gpus() -> int:
    """Return how many GPUs this build of FAISS can use; 0 for one without."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class Structure:
    """One FAISS index over rows 0, 1, 2, ..., as a plan says.

    Attributes:
        kind: As the plan's.
    """

    def __init__(self, index: faiss.Index, plan: Plan) -> None:
        self._index, self.kind = index, plan.kind

    @classmethod
    def train(cls, plan: Plan, dim: int, sample: np.ndarray, gpu: Gpu | None = None) -> Structure:
        """Return an empty structure.

        Args:
            plan: Which.
            dim: Length of a vector.
            sample: (rows, dim) float32 vectors like those to come; only ``lists`` looks at them.
            gpu: Helps with ``lists``.
        """
        if plan.kind == "flat":
            return cls(faiss.IndexFlatIP(dim), plan)
        factory = f"IVF{plan.num_lists},PQ{plan.num_subvectors}x4fsr"
        lists: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        lists.cp.niter = _KMEANS_ROUNDS
        lists.cp.min_points_per_centroid = lists.pq.cp.min_points_per_centroid = 1
        if gpu is None:
            lists.train(sample)
        else:
            gpu.help(lists, "clustering_index", faiss.IndexFlatIP(dim), lambda: lists.train(sample))
        return cls(lists, plan)

    @classmethod
    def unpack(cls, content: bytes, plan: Plan) -> Structure | None:
        """Return what `pack` gave; None if this version of FAISS cannot read it, or it is of another kind."""
        try:
            index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
        except RuntimeError:
            return None
        expected = faiss.IndexFlat if plan.kind == "flat" else faiss.IndexIVFPQFastScan
        is_it = isinstance(index, expected) and index.metric_type == faiss.METRIC_INNER_PRODUCT
        return cls(index, plan) if is_it else None

    def clone(self) -> Structure:
        """Return a copy, to which vectors can be added while this one is searched."""
        copied = Structure.__new__(Structure)
        copied._index, copied.kind = faiss.clone_index(self._index), self.kind
        return copied

    @property
    def num_rows(self) -> int:
        """How many vectors it holds."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._index.d)

    def pack(self) -> bytes:
        """Return all of it as bytes."""
        packed: bytes = faiss.serialize_index(self._index).tobytes()
        return packed

    def add(self, vectors: np.ndarray, gpu: Gpu | None = None) -> None:
        """Append vectors (rows, dim) float32; a GPU helps with ``lists``."""
        index: Any = self._index
        if gpu is None or self.kind == "flat":
            index.add(vectors)
        else:
            gpu.help(index, "quantizer", index.quantizer, lambda: index.add(vectors))

    def nearest(
        self, queries: np.ndarray, count: int, breadth: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return approximate scores and rows (queries, count), the best first; -1 where none was found.

        Args:
            queries: (queries, dim) float32.
            count: How many.
            breadth: As `Plan.breadth`; without meaning for ``flat``.
            allowed: (rows,) bool, which rows may be returned; all if None.
        """
        selector = None
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg,arg-type]
        parameters: faiss.SearchParameters
        if self.kind == "flat":
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        else:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=breadth)  # type: ignore[call-arg]
        scores, rows = self._index.search(queries, count, params=parameters)
        return scores, rows.astype(np.int64, copy=False)
