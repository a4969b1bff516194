"""Searching a published store, with the hits that the index gives."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm.errors import CapabilityError
from vlm.retrieval.backends import Backend
from vlm.retrieval.filters import Condition
from vlm.retrieval.manifest import Snapshot
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.queries.options import SearchOptions
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.retrieval.store.description import read_manifest
from vlm.retrieval.store.reading import Store
from vlm.retrieval.store.search import StoreBackend, StoredVectors
from vlm.retrieval.store.tables import Tables
from vlm.retrieval.strength import Grader, TextBank
from vlm.retrieval.strength.calibration import Calibration
from vlm.retrieval.words.search import WordSearch
from vlm.types import Hit, TextFeatures, VideoTextEncoder

if TYPE_CHECKING:
    from vlm.retrieval.backends.structured import StructuredBackend


class StoreSearcher(SnapshotSearcher):
    """Searches one generation of a store with the model that made the index.

    Any number of them may search one store; none writes anything.

    Args:
        uri: Where the index was published.
        model: The model that made it.
        around: As for `vlm.retrieval.searcher.Searcher`.
        bank: The same.
        with_structure: Search by the structure that was published, if there is one and FAISS is installed;
            else every vector is compared.

    Raises:
        InvalidInput: There is no store, or another model made it.
        IntegrityError: The store is damaged.
        CapabilityError: The model cannot search.
        MissingExtra: lancedb is not installed.
    """

    index: Store

    def __init__(
        self,
        uri: str,
        model: VideoTextEncoder,
        *,
        around: Callable[[Backend], Backend] | None = None,
        bank: TextBank | None = None,
        with_structure: bool = True,
    ) -> None:
        super().__init__(model)
        self._uri, self._around, self._bank = uri, around, bank or TextBank(model)
        self._structured: StructuredBackend | None = None
        self._with_structure = with_structure
        self._open(Store(uri))

    def refresh(self) -> None:
        """Go on to the newest generation of the store."""
        if not self.index.is_newest():
            self._open(Store(self._uri))

    def newest(self) -> StoreSearcher:
        """Return a searcher of the newest generation, which is read anew."""
        other = copy.copy(self)
        other.refresh()
        return other

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do, apart from reranking."""
        return self.model.capabilities - {"rerank"}

    @property
    def snapshot(self) -> Snapshot:
        """The generation that is searched."""
        return self.index.snapshot

    def page(self, encoded: EncodedQuery, options: SearchOptions) -> tuple[list[Hit], bool]:
        """Return what `search` does, and whether more would follow.

        Raises:
            CapabilityError: Asked for reranking or words: a store holds neither tokens nor sidecar files.
        """
        if options.rerank or options.words:
            what = "reranking" if options.rerank else "words"
            raise CapabilityError(
                f"{self._uri} is a published store, which has no {what}: leave that out, or search the index "
                "itself with --backend auto"
            )
        return super().page(encoded, options)

    def _open(self, store: Store) -> None:
        store.check_model(self.model)
        self._vectors = StoredVectors(store)
        self._structured = self._by_structure(store, self._vectors)
        backend: Backend = self._structured or StoreBackend(store)
        self._backend = backend if self._around is None else self._around(backend)
        self._words = WordSearch(store.snapshot)
        grades = store.state.grades
        known = None
        if grades is not None:
            known = Calibration(bank=grades.bank, num_rows=grades.num_rows, scores=grades.scores)
        if known is not None and not known.fits(self._bank.key, store.state.num_segments):
            known = None
        self._grader = Grader(self._bank, self._backend, store.snapshot.alive, None, None, known)
        self.index = store

    def _by_structure(self, store: Store, vectors: StoredVectors) -> StructuredBackend | None:
        """Return a backend by the structure that was published; None if there is none that can be used."""
        label = store.state.structure
        if label is None or not self._with_structure or importlib.util.find_spec("faiss") is None:
            return None
        from vlm.retrieval.backends.structured import StructuredBackend, unpacked

        known, found = self._structured, None
        if known is not None and self.index.state.structure == label:
            found = known.grown(vectors)
        if found is None and (content := store.structure()) is not None:
            found = unpacked(vectors, label, content)
        return None if found is None else StructuredBackend(vectors, *found)

    def _rows_where(self, condition: Condition) -> np.ndarray:
        return self.index.rows_where(condition.sql, condition.values)

    def _match(self, text: TextFeatures, rows: Sequence[int]) -> dict[int, float]:
        raise CapabilityError(f"{self._uri} is a published store, which has no reranking")


def source_of(uri: str) -> str:
    """Return where `load_model` finds the model of a store."""
    return read_manifest(Tables(uri)).index.model.source
