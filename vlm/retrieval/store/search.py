"""The nearest segments of a store: every group is asked, what they answer is merged and scored exactly.

Lance rounds the query to float16 and scores so; how far that may be off is known for each query, and a group
is asked for more until nothing that it has not given can be among the best.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm.errors import IntegrityError
from vlm.retrieval.backends.exact import check_queries, settle, tolerance
from vlm.retrieval.store.description import group_name
from vlm.retrieval.store.reading import Store
from vlm.retrieval.store.tables import among, between, vectors_of
from vlm.retrieval.vector_log import key_of, prefix_key

# more than are asked for, as the order may change
_MARGIN = 16
_GROWTH = 4
# longer lists of segments are no condition: more is fetched, and what may not be returned left out
_MAX_LISTED = 4096
# of a score of length one, in single precision, that Lance gives as a distance
_DISTANCE_ROUNDING = 1e-6


class StoredVectors:
    """The vectors of a store by row; see `vlm.retrieval.backends.exact.VectorSource`."""

    def __init__(self, store: Store) -> None:
        self._store, self.dim = store, store.manifest.features.dim
        self.num_rows = len(store.snapshot.alive)
        self.key = key_of(store.state.files)

    def prefix_key(self, num_rows: int) -> str | None:
        """Return the key that the first rows alone would have; None where they end within a part."""
        return prefix_key(self._store.state.files, num_rows)

    def blocks(self, max_rows: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float16 (at most max_rows, dim)); segments that are gone are zeros."""
        size = self._store.state.group_size
        for start in range(first, self.num_rows, max_rows):
            end = min(start + max_rows, self.num_rows)
            block = np.zeros((end - start, self.dim), np.float16)
            for number in range(start // size, (end - 1) // size + 1):
                if (table := self._store.groups.get(number)) is not None:
                    found = table.read(["segment", "vector"], between("segment", start, end))
                    segments, vectors = vectors_of(found, self.dim)
                    block[segments - start] = vectors
            yield start, block

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return float16 (len(rows), dim), in the order of `rows`.

        Raises:
            IntegrityError: The store lacks one of them.
        """
        result = np.empty((len(rows), self.dim), np.float16)
        owners = np.asarray(rows) // self._store.state.group_size
        for number in np.unique(owners).tolist():
            places = np.flatnonzero(owners == number)
            wanted = np.unique(rows[places])
            found = self._store.groups[number].read(["segment", "vector"], among("segment", wanted))
            segments, vectors = vectors_of(found, self.dim)
            order = np.argsort(segments)
            if not np.array_equal(segments[order], wanted):
                raise IntegrityError(
                    f"{self._store.groups[number].place}: expected {len(wanted)} segments, it has "
                    f"{len(segments)} of them; publish the index again"
                )
            result[places] = vectors[order][np.searchsorted(wanted, rows[places])]
        return result


class StoreBackend:
    """Asks every group of a store, and settles what they answer; see `vlm.retrieval.backends.Backend`."""

    name = "lance"
    shares_passes = False

    def __init__(self, store: Store) -> None:
        self._store, self._dim = store, store.manifest.features.dim

    def search(
        self, queries: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows of each query; see `Backend.search`."""
        queries = check_queries(queries, self._dim, top_k)
        alive = self._store.snapshot.alive
        fits = alive if allowed is None else alive & allowed
        scores = np.full((len(queries), top_k), -np.inf, np.float32)
        rows = np.full((len(queries), top_k), -1, np.int64)
        groups = [(number, *self._choice(number, fits)) for number in self._store.groups]
        for place, query in enumerate(queries):
            fetched = _Fetched(self._dim)
            for number, count, where in groups:
                if count:
                    fetched.add(*self._candidates(number, query, min(top_k, count), count, where, fits))
            found = settle(fetched, query[None], [[fetched.rows()]], top_k)
            scores[place], rows[place] = found[0][0], found[1][0]
        return scores, rows

    def _choice(self, number: int, fits: np.ndarray) -> tuple[int, str | None]:
        """Return how many rows of a group may be returned, and the condition that says which, if one does."""
        size = self._store.state.group_size
        mine = slice(number * size, (number + 1) * size)
        inside = np.flatnonzero(fits[mine]) + mine.start
        outside = np.flatnonzero(self._store.snapshot.alive[mine] & ~fits[mine]) + mine.start
        if not len(outside) or min(len(inside), len(outside)) > _MAX_LISTED:
            return len(inside), None
        if len(inside) <= len(outside):
            return len(inside), among("segment", inside)
        return len(inside), among("segment", outside, negated=True)

    def _candidates(
        self, number: int, query: np.ndarray, top_k: int, num_fits: int, where: str | None, fits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and vectors of a group, among them its best `top_k` of those that fit."""
        table, state = self._store.groups[number], self._store.state.table(group_name(number))
        assert state is not None
        length = float(np.linalg.norm(query))
        # a query of length one, whatever it was: half precision ends at 65504
        unit = query / length if length else query
        lost = float(np.linalg.norm(unit - unit.astype(np.float16).astype(np.float32)))
        slack = lost * state.largest_norm + float(tolerance(unit[None], state.largest_norm)[0])
        slack += _DISTANCE_ROUNDING * (1 + state.largest_norm)
        count = top_k + _MARGIN
        if where is None:  # as many as hold that many that fit, if these are spread evenly
            count = -(-count * state.num_rows // num_fits)
        while True:
            count = min(count, state.num_rows)
            rows, vectors, scores = table.nearest(unit, count, where)
            keep = fits[rows]
            is_all = count >= state.num_rows or len(rows) < count
            if is_all or (
                keep.sum() >= top_k and self._is_settled(unit, vectors[keep], scores, top_k, 2 * slack)
            ):
                return rows[keep], vectors[keep]
            count *= _GROWTH

    def _is_settled(
        self, unit: np.ndarray, vectors: np.ndarray, rounded: np.ndarray, top_k: int, slack: float
    ) -> bool:
        """Whether what lies behind the last of the rounded scores cannot be among the best."""
        scores = vectors.astype(np.float32) @ unit
        threshold = float(np.partition(scores, len(scores) - top_k)[len(scores) - top_k])
        return bool(float(rounded[-1]) + slack < threshold)


class _Fetched:
    """Vectors that a search was given, by row."""

    def __init__(self, dim: int) -> None:
        self._rows, self._vectors = [np.zeros(0, np.int64)], [np.zeros((0, dim), np.float16)]

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        self._rows.append(rows)
        self._vectors.append(vectors)

    def rows(self) -> np.ndarray:
        return np.concatenate(self._rows)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        mine = self.rows()
        order = np.argsort(mine)
        return np.concatenate(self._vectors)[order][np.searchsorted(mine[order], rows)]
