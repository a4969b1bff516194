"""A store of many segments carries the index's search structure, and finds what the index finds by it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytest.importorskip("lancedb")
pytest.importorskip("faiss")

from vlm.errors import IntegrityError
from vlm.evaluation.tradeoff.stored import SyntheticModel, changes_of, store
from vlm.evaluation.tradeoff.synthetic import SEGMENTS_PER_VIDEO, SyntheticVectors
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.store.description import STRUCTURE, read_manifest
from vlm.retrieval.store.publishing import publish
from vlm.retrieval.store.reading import Store
from vlm.retrieval.store.searcher import StoreSearcher
from vlm.retrieval.store.tables import Tables

VECTORS = SyntheticVectors(dim=32)
NUM_ROWS = 4000


@pytest.fixture(autouse=True)
def small_lists(monkeypatch):
    """Lists from the first segment on; what a filter leaves is compared one by one only below fifty."""
    monkeypatch.setattr("vlm.retrieval.backends.structured.kind_for", lambda num_rows: "lists")
    monkeypatch.setattr("vlm.retrieval.backends.structured.SCAN_ROWS", 50)


@pytest.fixture
def published(tmp_path):
    """An index whose structure holds segments that have gone since, and a store of it in three groups."""
    index, model = store(tmp_path / "i", VECTORS, NUM_ROWS), SyntheticModel(VECTORS, NUM_ROWS)
    Searcher(index, model)  # makes the structure
    index.remove([f"video-{row:07d}" for row in (1, 77, 200)])
    publish(index, str(tmp_path / "s"), group_size=1500)
    return index, str(tmp_path / "s"), model


def grow(index, count):
    block = next(VECTORS.blocks(NUM_ROWS + count))[NUM_ROWS:]
    with index.writing() as catalog:
        shape = SEGMENTS_PER_VIDEO, 0
        catalog.commit(changes_of(index.log, block, NUM_ROWS, catalog.next_part(), shape))
    index.refresh()


def same_hits(searcher, other) -> int:
    """Compare what both find, and return how many hits that were."""
    count = 0
    for vector in VECTORS.texts(12, NUM_ROWS, seed=5):
        for options in ({}, {"top_k": 40}, {"where": "path like '%3.mp4'"}, {"where": "path like '%33.mp4'"}):
            hits = searcher.search(EncodedQuery(vector=vector), **options)
            assert hits == other.search(EncodedQuery(vector=vector), **options)
            count += len(hits)
    return count


def test_hits_are_those_of_the_index_s_structure(published) -> None:
    index, uri, model = published
    searcher, other = Searcher(index, model), StoreSearcher(uri, model)
    assert same_hits(searcher, other) > 500
    stated = other.index.info()["structure"]
    assert stated == index.info()["structure"]
    assert stated["kind"] == "lists" and set(stated["recall_at_10"]) == {"stored", "texts"}


def test_it_is_written_and_read_once(published, monkeypatch) -> None:
    index, uri, model = published
    other = StoreSearcher(uri, model)
    before = read_manifest(Tables(uri)).table(STRUCTURE)
    grow(index, 200)
    report = publish(index, uri)
    assert report.num_added == 200
    assert read_manifest(Tables(uri)).table(STRUCTURE) == before
    with monkeypatch.context() as patch:
        patch.setattr(Store, "structure", None)
        other.refresh()
    assert same_hits(Searcher(index, model), other) > 500
    assert same_hits(StoreSearcher(uri, model), other) > 500


def test_another_structure_takes_its_place(published) -> None:
    index, uri, model = published
    other, before = StoreSearcher(uri, model), read_manifest(Tables(uri)).structure
    grow(index, NUM_ROWS)
    Searcher(index, model)  # measured and written again: half of the rows are new
    publish(index, uri)
    other.refresh()
    assert other.index.state.structure != before
    assert same_hits(Searcher(index, model), other) > 500


def test_without_faiss_every_vector_is_compared(published, monkeypatch) -> None:
    index, uri, model = published
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else found(name))
    exact = Searcher(index, model, backend="exact")
    assert same_hits(exact, StoreSearcher(uri, model)) > 500
    monkeypatch.undo()
    assert same_hits(exact, StoreSearcher(uri, model, with_structure=False)) > 500


def test_a_damaged_structure_is_named(published, tmp_path) -> None:
    _, uri, model = published
    (file,) = (tmp_path / "s" / "structure.lance" / "data").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="structure"):
        StoreSearcher(uri, model)


def test_of_an_index_that_was_compacted_no_old_structure_is_taken(published) -> None:
    index, uri, model = published
    from vlm.retrieval.upkeep.compaction import compact

    compact(index)
    index = VideoIndex.open(index.folder)
    publish(index, uri)
    assert same_hits(Searcher(index, model, backend="exact"), StoreSearcher(uri, model)) > 500
    assert np.count_nonzero(index.snapshot.alive) == NUM_ROWS - 60
