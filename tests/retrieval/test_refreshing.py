"""Going on to a new generation reads what is new, and gives what opening the index afresh gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vlm.errors import BusyError
from vlm.evaluation.tradeoff.stored import SyntheticModel, changes_of, store
from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.backends import ExactBackend, is_outgrown
from vlm.retrieval.backends.cache import stated
from vlm.retrieval.backends.structured import FaissBackend
from vlm.retrieval.catalog import Catalog, Changes, Rejection
from vlm.retrieval.upkeep.compaction import compact

DIM, FRAMES, SHAPE = 16, 3, (2, 3)
VECTORS = SyntheticVectors(DIM)


@pytest.fixture
def index(tmp_path):
    return store(tmp_path / "i", VECTORS, 600, *SHAPE)


def add(index, count, seed=0):
    rows = VECTORS.texts(count, 600, seed)
    with VideoIndex.open(index.folder).writing() as catalog:
        first = 2 * (catalog.next_video_row() - 1)
        catalog.commit(changes_of(index.log, rows, first, catalog.next_part(), SHAPE))


def remove(index, *keys):
    with VideoIndex.open(index.folder).writing() as catalog:
        catalog.commit(Changes(removed_videos=list(keys)))


def rename(index, key):
    """Give a video another path: a new one in the rows of the old."""
    with VideoIndex.open(index.folder).writing() as catalog:
        generation = catalog.latest().id
        video = next(video for video in catalog.videos(generation) if video.row == key)
        spans = [span for span in catalog.spans(generation) if span.video == key]
        row = catalog.next_video_row()
        moved = dataclasses.replace(video, row=row, path=b"/moved.mp4", video_id=f"moved-{row}")
        spans = [dataclasses.replace(span, video=row) for span in spans]
        catalog.commit(Changes(videos=[moved], spans=spans, removed_videos=[key]))


def reject(index):
    with VideoIndex.open(index.folder).writing() as catalog:
        catalog.commit(Changes(rejected=[Rejection(path=b"/x", reason="broken", detail="is broken")]))


def long_video(index):
    """Commit a part first, and only then the video whose rows it holds."""
    rows = VECTORS.texts(4, 600, 9)
    with VideoIndex.open(index.folder).writing() as catalog:
        made = changes_of(index.log, rows, 2 * (catalog.next_video_row() - 1), catalog.next_part(), SHAPE)
        early = Changes(files=made.files, rejected=[Rejection(path=b"/y", reason="r", detail="d")])
        catalog.commit(early)
        index.refresh()
        made.files = []
        catalog.commit(made)


def same(found, expected):
    assert (found.generation, found.videos) == (expected.generation, expected.videos)
    assert (found.parts, found.files) == (expected.parts, expected.files)
    for name in ("row_video", "row_bounds", "row_hashes", "alive", "keys"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)
    assert found.places == expected.places


@pytest.mark.parametrize(
    "changes",
    [
        [lambda i: add(i, 10)],
        [lambda i: add(i, 9), lambda i: add(i, 1, 1)],
        [lambda i: remove(i, 1, 7, 300)],
        [lambda i: add(i, 4), lambda i: remove(i, 301, 5)],
        [lambda i: rename(i, 12)],
        [lambda i: rename(i, 300), lambda i: add(i, 6), lambda i: remove(i, 301, 302)],
        [reject],
        [long_video, lambda i: remove(i, 302), lambda i: add(i, 2)],
        [lambda i: remove(i, *range(1, 301)), lambda i: add(i, 4)],
        [lambda i: remove(i, 3), lambda i: compact(VideoIndex.open(i.folder)), lambda i: add(i, 8)],
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_refreshed_reader_equals_a_new_one(index, changes, at_once):
    first = index.snapshot
    before = {name: getattr(first, name).copy() for name in ("row_video", "row_bounds", "row_hashes")}
    for change in changes:
        change(index)
        if not at_once:
            same(index.refresh(), VideoIndex.open(index.folder).snapshot)
    same(index.refresh(), VideoIndex.open(index.folder).snapshot)
    assert index.snapshot is not first
    # who still works with the earlier generation must not notice
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(first, name), array)


def test_so_much_is_read_as_is_new(index, monkeypatch):
    read, query = [0], Catalog.query

    def counted(self, *arguments):
        rows = query(self, *arguments)
        read[0] += len(rows)
        return rows

    def cost(change):
        change()
        monkeypatch.setattr(Catalog, "query", counted)
        read[0] = 0
        index.refresh()
        monkeypatch.setattr(Catalog, "query", query)
        return read[0]

    # a video and a span for every two rows, and a few rows whatever was added
    few, more = cost(lambda: add(index, 10)), cost(lambda: add(index, 40))
    assert (few, more) == (10 + 3, 40 + 3)
    assert cost(lambda: remove(index, 3, 4)) == 2 + 3
    assert cost(lambda: rename(index, 9)) == 3 + 3
    monkeypatch.setattr(Catalog, "query", counted)
    read[0] = 0
    VideoIndex.open(index.folder)
    assert read[0] > 600


def test_files_that_are_mapped_are_not_opened_again(index, monkeypatch):
    opened, read = [], type(index.log).read
    vectors = index.vectors()
    add(index, 6)
    add(index, 8, 1)
    index.refresh()
    monkeypatch.setattr(type(index.log), "read", lambda s, name, *a: opened.append(name) or read(s, name, *a))
    grown = index.vectors(vectors)
    assert len(opened) == 2 and grown.num_rows == 614
    whole = VideoIndex.open(index.folder).vectors()
    assert grown.key == whole.key and grown.prefix_key(600) == vectors.key
    rows = np.arange(614)
    np.testing.assert_array_equal(grown.gather(rows), whole.gather(rows))


@pytest.mark.parametrize("kind", ["flat", "lists"])
def test_a_structure_that_has_grown_finds_what_one_that_was_read_does(index, tmp_path, kind):
    pytest.importorskip("faiss")
    cache, queries = tmp_path / "ann", VECTORS.texts(20, 600, 5)
    known = FaissBackend(index.vectors(), cache, texts=lambda: queries, kind=kind)
    expected = known.search(queries, 9)
    add(index, 30)
    index.refresh()
    grown = FaissBackend(index.vectors(), tmp_path / "nowhere", kind=kind, known=known)
    read = FaissBackend(VideoIndex.open(index.folder).vectors(), cache, texts=lambda: queries, kind=kind)
    assert grown.label == dataclasses.replace(read.label, sha256="", size_bytes=0)
    for mine, other in zip(grown.search(queries, 9), read.search(queries, 9), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (grown.search(queries, 40)[1] >= 600).any()
    # the one that was copied holds what it held
    for mine, other in zip(known.search(queries, 9), expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["flat", "lists"])
def test_an_outgrown_structure_serves_until_another_is_made(index, tmp_path, monkeypatch, kind):
    pytest.importorskip("faiss")
    monkeypatch.setattr("vlm.retrieval.backends.structured.SCAN_ROWS", 20)
    cache, queries = tmp_path / "ann", VECTORS.texts(20, 600, 5)
    backend = FaissBackend(index.vectors(), cache, texts=lambda: queries, kind=kind)
    kept = stated(cache)
    # less than an eighth is new, then more: what was measured of fewer rows goes on to serve
    for seed, (count, is_due) in enumerate(((40, False), (40, False), (40, True), (2000, True))):
        add(index, count, seed)
        index.refresh()
        backend = FaissBackend(index.vectors(), cache, texts=not_called, kind=kind, known=backend)
        newest = index.vectors().gather(np.arange(backend._vectors.num_rows - 10, backend._vectors.num_rows))
        assert backend.is_outgrown is is_due and stated(cache) == kept
        found = backend.search(newest.astype(np.float32), 3)[1][:, 0]
        assert np.count_nonzero(found >= backend._vectors.num_rows - 10) >= (10 if kind == "flat" else 8)
    made = FaissBackend(index.vectors(), cache, texts=lambda: queries, kind=kind)
    assert not made.is_outgrown and stated(cache)["num_rows"] == made.label.num_rows == 2720
    assert made.label.num_trained == (2720 if kind == "lists" else 600)
    assert not is_outgrown(ExactBackend(index.vectors()))


def not_called():
    raise AssertionError("something was measured")


def test_what_grows_out_of_one_kind_is_searched_by_it_until_it_is_renewed(index, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr("vlm.retrieval.backends.plan.FLAT_ROWS", 700)
    model = SyntheticModel(VECTORS, 600)
    searcher = Searcher(index, model, backend="faiss")
    other = Searcher(VideoIndex.open(index.folder), model, backend="faiss")
    add(index, 101)
    newest = searcher.newest()
    assert newest.is_outgrown and not searcher.is_outgrown and stated(index.folder / "ann")["kind"] == "flat"
    query = searcher.encode("anything")
    exact = Searcher(VideoIndex.open(index.folder), model, backend="exact")
    assert newest.search(query, top_k=300) == exact.search(query, top_k=300)
    newest.renew()
    assert not newest.is_outgrown and stated(index.folder / "ann")["kind"] == "lists"
    # without anybody beside it to do that, a refresh ends with the right structure
    other.refresh()
    assert not other.is_outgrown and other._opened.plan.kind == "lists"


def test_a_searcher_goes_on_while_its_fork_does_not(index):
    model = SyntheticModel(VECTORS, 600)
    searcher = Searcher(index, model)
    query = searcher.encode("anything")
    before = searcher.search(query, top_k=50)
    fork = searcher.fork()
    add(index, 40)
    remove(index, 2, 4)
    fork.refresh()
    assert searcher.search(query, top_k=50) == before
    assert fork.search(query, top_k=400) == Searcher(VideoIndex.open(index.folder), model).search(
        query, top_k=400
    )
    assert fork.index.snapshot.generation.id == searcher.index.snapshot.generation.id + 2
    compact(VideoIndex.open(index.folder))
    fork.refresh()
    fresh = Searcher(VideoIndex.open(index.folder), model)
    assert fork.search(query, top_k=400) == fresh.search(query, top_k=400)
    with pytest.raises(BusyError):
        searcher.index.check_held()
