"""FAISS as a cache over the vector log; the only module that imports it.

FAISS proposes candidates; scores and order are settled by the definition of the exact backend.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from vlm.retrieval.backends import cache
from vlm.retrieval.backends.exact import VectorSource, check_queries, settle, tolerance

_BLOCK_ROWS = 16384
_SPARE_CANDIDATES = 16
# the cache is written again once an eighth of the rows is not in it
_MAX_GROWTH = 8


class FaissBackend:
    """Flat inner product."""

    name = "faiss"

    def __init__(self, vectors: VectorSource, folder: Path) -> None:
        self._vectors = vectors
        self._index, self._largest_norm = _complete(vectors, folder, _load(vectors, folder))

    def search(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows of each query; see `Backend.search`."""
        queries = check_queries(queries, self._vectors, top_k)
        num_allowed = self._vectors.num_rows if allowed is None else int(np.count_nonzero(allowed))
        parameters = None
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))  # type: ignore[call-arg,arg-type]
        slack = tolerance(queries, self._largest_norm)
        candidates: list[list[np.ndarray]] = [[] for _ in queries]
        open_queries = np.arange(len(queries)) if num_allowed else np.zeros(0, np.int64)
        wanted = min(top_k + _SPARE_CANDIDATES, num_allowed)
        while len(open_queries):
            scores, rows = self._index.search(queries[open_queries], wanted, params=parameters)
            unsettled = []
            for line, query in enumerate(open_queries.tolist()):
                # as long as the last candidate could tie with the last place, more may
                if wanted < num_allowed and scores[line, -1] >= scores[line, top_k - 1] - 2 * slack[query]:
                    unsettled.append(query)
                else:
                    candidates[query] = [rows[line][rows[line] >= 0].astype(np.int64)]
            open_queries = np.array(unsettled, np.int64)
            wanted = min(wanted * 4, num_allowed)
        return settle(self._vectors, queries, candidates, top_k)


def _load(vectors: VectorSource, folder: Path) -> tuple[faiss.Index, float] | None:
    """Return the cached index of the first rows if it is of these vectors, and its longest norm."""
    if (found := cache.load(folder)) is None:
        return None
    label, content = found
    if vectors.prefix_key(label.num_rows) != label.key:
        return None
    try:
        index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    except RuntimeError:  # written by another version
        return None
    return (index, label.largest_norm) if (index.ntotal, index.d) == (label.num_rows, vectors.dim) else None


def _complete(
    vectors: VectorSource, folder: Path, cached: tuple[faiss.Index, float] | None
) -> tuple[faiss.Index, float]:
    """Add the rows that the cached index lacks, and keep the whole once they are many."""
    index, largest_norm = cached or (faiss.IndexFlatIP(vectors.dim), 0.0)
    first = index.ntotal
    for _, block in vectors.blocks(_BLOCK_ROWS, first):
        values = np.ascontiguousarray(block, np.float32)
        largest_norm = max(largest_norm, float(np.linalg.norm(values, axis=1).max(initial=0.0)))
        index.add(values)
    num_new = vectors.num_rows - first
    # a small addition must not cost the writing of all that was there
    if cached is None or num_new * _MAX_GROWTH > vectors.num_rows:
        content = faiss.serialize_index(index).tobytes()
        cache.save(folder, content, key=vectors.key, num_rows=vectors.num_rows, largest_norm=largest_norm)
    return index, largest_norm
