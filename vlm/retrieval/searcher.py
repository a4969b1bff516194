"""Searching an index folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np

from vlm.errors import BusyError
from vlm.retrieval.backends import Backend, is_outgrown, open_backend
from vlm.retrieval.filters import Condition
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.manifest import Snapshot
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.retrieval.rerank import OnModel, here, match_rows
from vlm.retrieval.strength import Grader, TextBank
from vlm.retrieval.vector_log import LogVectors
from vlm.retrieval.words.search import WordSearch
from vlm.types import TextFeatures, VideoTextEncoder


class Searcher(SnapshotSearcher):
    """Searches one generation of an index with the model that made it.

    Args:
        index: The index; `refresh` goes on to its newest generation.
        model: The model that made it.
        backend: ``exact``, ``faiss``, or ``auto``: FAISS if installed. They give the same hits up to 50,000
            segments; beyond, FAISS may miss some, and `VideoIndex.info` states how many.
        around: Called with the backend of each generation, returns what is searched in its place.
        bank: The unrelated texts that hits are graded against, and by which the recall of a structure is
            measured; those of the model's domain if None.
        on_model: Runs what reranking needs the model for, where a search's own thread may not.

    Raises:
        InvalidInput: The index was made by another model.
        CapabilityError: The model cannot search.
    """

    index: VideoIndex
    _vectors: LogVectors

    def __init__(
        self,
        index: VideoIndex,
        model: VideoTextEncoder,
        *,
        backend: str = "auto",
        around: Callable[[Backend], Backend] | None = None,
        bank: TextBank | None = None,
        on_model: OnModel = here,
    ) -> None:
        index.check_model(model)
        super().__init__(model)
        self.index = index
        self._backend_name, self._around = backend, around
        self._bank, self._on_model = bank or TextBank(model), on_model
        self._open()

    def refresh(self) -> None:
        """Go on to the newest generation of the index; where that calls for it, `renew` the structure."""
        self._go_on()
        if self.is_outgrown:
            self.renew()

    @property
    def is_outgrown(self) -> bool:
        """Whether the search structure serves, but should be trained or measured anew; see `renew`."""
        return is_outgrown(self._opened)

    def renew(self) -> None:
        """Train or measure the search structure anew, as its size calls for; that takes up to minutes."""
        self._search_with(self._open_backend(None))

    def fork(self) -> Searcher:
        """Return another searcher of the same generation, to be refreshed while this one is used."""
        other = copy.copy(self)
        other.index = self.index.fork()
        return other

    def newest(self) -> Searcher | None:
        """Return a searcher of the newest generation; what it shares with this one is not read again.

        That takes as long as what is new does, even if its structure then `is_outgrown`. None if this one is
        gone: the index was compacted, or is another one now.
        """
        searcher = self.fork()
        try:
            searcher.index.check_held()
        except BusyError:
            return None
        searcher._go_on()
        return searcher

    @property
    def stores_tokens(self) -> bool:
        """Whether reranking reads what is stored; else it decodes and encodes the segments again."""
        return self.index.manifest.features.store_tokens != "none"

    @property
    def snapshot(self) -> Snapshot:
        """The generation that is searched."""
        return self.index.snapshot

    def _go_on(self) -> None:
        # the index may have gone on by itself, after an addition through it
        if self.index.refresh() is not self._snapshot:
            self._open(self._vectors, self._opened)

    def _open(self, known: LogVectors | None = None, known_backend: Backend | None = None) -> None:
        try:
            self._vectors = self.index.vectors(known)
        except BusyError:  # a compaction came between
            self.index.refresh()
            self._vectors = self.index.vectors(known)
        self._snapshot = self.index.snapshot
        self._search_with(self._open_backend(known_backend))
        self._words = WordSearch(self.index.snapshot)

    def _open_backend(self, known: Backend | None) -> Backend:
        return open_backend(
            self._backend_name,
            self._vectors,
            self.index.folder / "ann",
            texts=self._bank.embeddings,
            known=known,
        )

    def _search_with(self, backend: Backend) -> None:
        self._opened, index, model = backend, self.index, self.model
        self._backend = backend if self._around is None else self._around(backend)
        has_head = "rerank" in model.capabilities and self.stores_tokens
        self._grader = Grader(
            self._bank,
            self._backend,
            index.snapshot.alive,
            index.folder / "ann",
            self._rescored if has_head else None,
        )

    def _rows_where(self, condition: Condition) -> np.ndarray:
        return self.index.rows_where(condition.sql, condition.values)

    def _match(self, text: TextFeatures, rows: Sequence[int]) -> dict[int, float]:
        return match_rows(self.index, self.model, text, rows, self._on_model)
