"""FAISS as a cache over the vector log; the only module that imports it.

FAISS proposes candidates; scores and order are settled by the definition of the exact backend. Its own file
format has no checksum and its writer can report success on a full disk, so the bytes go through our writer.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np

from vlm.errors import NoSpaceError
from vlm.retrieval.backends.exact import VectorSource, check_queries, settle, tolerance
from vlm.retrieval.durability import hash_file, write_bytes_durably

_BLOCK_ROWS = 16384
_SPARE_CANDIDATES = 16
_DATA, _LABEL = "flat.faiss", "flat.json"


class FaissBackend:
    """Flat inner product."""

    name = "faiss"

    def __init__(self, vectors: VectorSource, cache: Path) -> None:
        self._vectors = vectors
        self._index, self._largest_norm = _load(vectors, cache) or _build(vectors, cache)

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


def _load(vectors: VectorSource, cache: Path) -> tuple[faiss.Index, float] | None:
    """Return the cached index if it is of these vectors and undamaged."""
    try:
        label = json.loads((cache / _LABEL).read_bytes())
        if label["key"] != vectors.key or hash_file(cache / _DATA) != label["sha256"]:
            return None
        content = np.fromfile(cache / _DATA, np.uint8)
        index = faiss.deserialize_index(content)
        largest_norm = float(label["largest_norm"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return (index, largest_norm) if index.ntotal == vectors.num_rows and index.d == vectors.dim else None


def _build(vectors: VectorSource, cache: Path) -> tuple[faiss.Index, float]:
    """Build the index from the vectors, and keep it if there is a place to."""
    index, largest_norm = faiss.IndexFlatIP(vectors.dim), 0.0
    for _, block in vectors.blocks(_BLOCK_ROWS):
        values = np.ascontiguousarray(block, np.float32)
        largest_norm = max(largest_norm, float(np.linalg.norm(values, axis=1).max(initial=0.0)))
        index.add(values)
    # a reader may have no right or no room to write; it searches all the same
    with suppress(OSError, NoSpaceError):
        cache.mkdir(exist_ok=True)
        (cache / _LABEL).unlink(missing_ok=True)
        sha256, _ = write_bytes_durably(cache / _DATA, faiss.serialize_index(index).tobytes())
        label = {"key": vectors.key, "sha256": sha256, "largest_norm": largest_norm}
        write_bytes_durably(cache / _LABEL, json.dumps(label).encode())
    return index, largest_norm
