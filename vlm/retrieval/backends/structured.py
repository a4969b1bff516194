"""The backend that FAISS speeds up: candidates from a structure, scores and order from the stored vectors.

``flat`` gives the hits of the exact backend. ``lists`` may miss some; how many was measured when it was kept.
What is chosen narrowly, or asked for in large numbers, is looked up exactly whatever the structure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm.retrieval.backends import cache
from vlm.retrieval.backends.calibration import calibrate
from vlm.retrieval.backends.exact import (
    ExactBackend,
    VectorSource,
    check_queries,
    search_rows,
    settle,
    tolerance,
)
from vlm.retrieval.backends.faiss import Gpu, Structure, count_gpus
from vlm.retrieval.backends.plan import MAX_GROWTH, Kind, Plan, kind_for, plan_for

_BLOCK_ROWS = 16384
_SPARE_CANDIDATES = 16
# the cache is written again once an eighth of the rows is not in it
_MAX_MISSING = 8
# so few allowed rows are compared one by one: it is exact, and takes a few milliseconds
SCAN_ROWS = 5_000
_MOST_CANDIDATES = 16_384
_CANDIDATES_PER_HIT = 4
_TRAINING_ROWS = 100_000
_ROWS_PER_LIST = 40


class StructuredBackend:
    """Searches by a structure that is there; the rows that it lacks are added to it.

    Args:
        vectors: What is searched.
        structure: Of the first of their rows.
        label: What it is of.
        gpu: Helps to add rows.

    Attributes:
        label: What the structure is of, how far it looks, and the recall that was measured.
    """

    name = "faiss"

    def __init__(
        self, vectors: VectorSource, structure: Structure, label: cache.Label, gpu: Gpu | None = None
    ) -> None:
        self._vectors, self._exact = vectors, ExactBackend(vectors)
        self._structure, self.label = structure, label
        self._fill(gpu)

    @property
    def plan(self) -> Plan:
        """The structure, and how far it looks."""
        return self.label.plan

    @property
    def shares_passes(self) -> bool:
        """Whether queries share what is read: all vectors, or the lists and candidates of each."""
        return self.plan.kind == "flat"

    def search(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows of each query; see `Backend.search`."""
        queries = check_queries(queries, self._vectors.dim, top_k)
        num_allowed = self._vectors.num_rows if allowed is None else int(np.count_nonzero(allowed))
        if self.plan.kind == "flat":
            return self._search_flat(queries, top_k, allowed, num_allowed)
        if num_allowed <= SCAN_ROWS:
            rows = np.arange(num_allowed) if allowed is None else np.flatnonzero(allowed)
            return search_rows(self._vectors, queries, rows, top_k, self.label.largest_norm)
        depth = self.plan.depth + _CANDIDATES_PER_HIT * top_k
        if depth > _MOST_CANDIDATES:
            return self._exact.search(queries, top_k, allowed)
        found = [
            search_rows(self._vectors, queries[query : query + 1], rows, top_k, self.label.largest_norm)
            for query, rows in enumerate(self._candidates(queries, depth, allowed, num_allowed))
        ]
        if not found:
            return settle(self._vectors, queries, [], top_k)
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def grown(self, vectors: VectorSource) -> tuple[Structure, cache.Label] | None:
        """Return a copy of the structure if these are the same vectors and more, which can be added to it."""
        if vectors.prefix_key(self._vectors.num_rows) != self._vectors.key:
            return None
        return self._structure.clone(), self.label

    def _search_flat(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None, num_allowed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        slack = tolerance(queries, self.label.largest_norm)
        candidates: list[list[np.ndarray]] = [[] for _ in queries]
        open_queries = np.arange(len(queries)) if num_allowed else np.zeros(0, np.int64)
        wanted = min(top_k + _SPARE_CANDIDATES, num_allowed)
        while len(open_queries):
            scores, rows = self._structure.nearest(queries[open_queries], wanted, 0, allowed)
            unsettled = []
            for line, query in enumerate(open_queries.tolist()):
                # as long as the last candidate could tie with the last place, more may
                if wanted < num_allowed and scores[line, -1] >= scores[line, top_k - 1] - 2 * slack[query]:
                    unsettled.append(query)
                else:
                    candidates[query] = [rows[line][rows[line] >= 0]]
            open_queries = np.array(unsettled, np.int64)
            wanted = min(wanted * 4, num_allowed)
        return settle(self._vectors, queries, candidates, top_k)

    def _candidates(
        self, queries: np.ndarray, depth: int, allowed: np.ndarray | None, num_allowed: int
    ) -> list[np.ndarray]:
        """Return rows worth scoring, ascending, for each query; looks at as many as without a filter."""
        most, wanted = self.plan.num_lists, min(depth, num_allowed)
        breadth = min(most, math.ceil(self.plan.breadth * self._vectors.num_rows / num_allowed))
        candidates = [np.zeros(0, np.int64) for _ in queries]
        open_queries = np.arange(len(queries))
        while len(open_queries):
            _, rows = self._structure.nearest(queries[open_queries], wanted, breadth, allowed)
            for line, query in enumerate(open_queries.tolist()):
                candidates[query] = np.sort(rows[line][rows[line] >= 0])
            # what is allowed may lie far from the query, where nothing was looked at
            is_short = np.array([len(candidates[query]) < wanted for query in open_queries.tolist()])
            if breadth == most:
                break
            open_queries, breadth = open_queries[is_short], min(most, breadth * 4)
        return candidates

    def _fill(self, gpu: Gpu | None) -> None:
        """Add the rows that the structure lacks."""
        largest_norm = self.label.largest_norm
        for _, block in self._vectors.blocks(_BLOCK_ROWS, self._structure.num_rows):
            values = np.ascontiguousarray(block, np.float32)
            largest_norm = max(largest_norm, float(np.linalg.norm(values, axis=1).max(initial=0.0)))
            self._structure.add(values, gpu)
        self.label = dataclasses.replace(self.label, largest_norm=largest_norm)


class FaissBackend(StructuredBackend):
    """Searches by a structure chosen for the number of rows; a GPU that FAISS knows helps to make ``lists``.

    Args:
        vectors: What is searched.
        folder: Where the structure is kept.
        texts: Returns embedded texts (texts, dim) by which recall is measured when a structure is built.
        kind: The structure, whatever the number of rows.
        known: A backend of earlier rows of the same vectors; its structure is copied and goes on to serve;
            nothing is trained, measured or written, which would take up to minutes.

    Attributes:
        is_outgrown: Whether that is due: a backend that is made without `known` does it.
    """

    def __init__(
        self,
        vectors: VectorSource,
        folder: Path,
        *,
        texts: Callable[[], np.ndarray] | None = None,
        kind: Kind | None = None,
        known: FaissBackend | None = None,
    ) -> None:
        kind = kind or kind_for(vectors.num_rows)
        if known is not None and (grown := known.grown(vectors)) is not None:
            super().__init__(vectors, *grown)
            self.is_outgrown = not _fits(self.label, vectors, kind) or self._is_due(texts is not None)
            return
        found, self.is_outgrown = _load(vectors, folder, kind), False
        gpu = Gpu() if found is None and kind == "lists" and count_gpus() else None
        super().__init__(vectors, *(found or _train(vectors, kind, gpu)), gpu)
        if found is None or self._is_due(texts is not None):
            if kind == "lists":
                self._calibrate(texts() if texts else None, gpu)
            if gpu is not None:
                made_on = f"cpu, since the GPU failed: {gpu.failure}" if gpu.failure else "gpu"
                self.label = dataclasses.replace(self.label, made_on=made_on)
            self.label = dataclasses.replace(self.label, key=vectors.key, num_rows=vectors.num_rows)
            cache.save(folder, self._structure.pack(), self.label)

    def _is_due(self, has_texts: bool) -> bool:
        """Whether the structure is to be measured again, and written with the rows it lacks on disk."""
        num_missing = self._vectors.num_rows - self.label.num_rows
        # repaired without a model at hand, it was measured by stored vectors alone, and looks not far enough
        is_unmeasured = self.plan.kind == "lists" and all(r.queries != "texts" for r in self.label.recalls)
        # a small addition must not cost the writing of all that was there
        return (has_texts and is_unmeasured) or num_missing * _MAX_MISSING > self._vectors.num_rows

    def _calibrate(self, texts: np.ndarray | None, gpu: Gpu | None) -> None:
        """Find out how far this structure has to look, and state the recall that it then has."""

        def search(queries: np.ndarray, top_k: int, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
            self.label = dataclasses.replace(self.label, plan=plan)
            return self.search(queries, top_k)

        exact = self._exact if gpu is None else ExactBackend(self._vectors, gpu.product)
        plan, recalls = calibrate(self._vectors, exact, self.plan, search, texts)
        self.label = dataclasses.replace(self.label, plan=plan, recalls=recalls)


def unpacked(
    vectors: VectorSource, label: cache.Label, content: bytes
) -> tuple[Structure, cache.Label] | None:
    """Return a kept structure; None if it is not of the first rows of these vectors, or cannot be read."""
    if vectors.prefix_key(label.num_rows) != label.key:
        return None
    structure = Structure.unpack(content, label.plan)
    if structure is None or (structure.num_rows, structure.dim) != (label.num_rows, vectors.dim):
        return None
    return structure, label


def _load(vectors: VectorSource, folder: Path, kind: Kind) -> tuple[Structure, cache.Label] | None:
    """Return the cached structure of the first rows if it is of these vectors and still fits their number."""
    if (found := cache.load(folder)) is None:
        return None
    return unpacked(vectors, *found) if _fits(found[0], vectors, kind) else None


def _fits(label: cache.Label, vectors: VectorSource, kind: Kind) -> bool:
    """Whether a structure is of the kind that so many rows call for, and was trained on enough of them."""
    has_outgrown = kind == "lists" and vectors.num_rows > MAX_GROWTH * label.num_trained
    return label.plan.kind == kind and not has_outgrown


def _train(vectors: VectorSource, kind: Kind, gpu: Gpu | None) -> tuple[Structure, cache.Label]:
    """Return an empty structure fit for some vectors."""
    plan = plan_for(vectors.num_rows, vectors.dim, kind)
    sample = np.zeros((0, vectors.dim), np.float32)
    if kind == "lists":
        count = min(vectors.num_rows, max(_TRAINING_ROWS, _ROWS_PER_LIST * plan.num_lists))
        rows = np.sort(np.random.default_rng(0).choice(vectors.num_rows, count, replace=False))
        sample = vectors.gather(rows).astype(np.float32)
    label = cache.Label(
        key=vectors.key, num_rows=0, largest_norm=0.0, plan=plan, num_trained=vectors.num_rows
    )
    return Structure.train(plan, vectors.dim, sample, gpu), label
