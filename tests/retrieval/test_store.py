"""A published store gives the hits of the index's exact searcher, and survives what happens to stores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("lancedb")

from vlm.errors import BusyError, CapabilityError, IntegrityError, InvalidInput
from vlm.retrieval import Mix, Moment, Part, Searcher, VideoIndex
from vlm.retrieval.queries.options import SearchOptions
from vlm.retrieval.store.description import MANIFEST, read_manifest
from vlm.retrieval.store.publishing import publish
from vlm.retrieval.store.reading import Store
from vlm.retrieval.store.search import StoreBackend
from vlm.retrieval.store.searcher import StoreSearcher
from vlm.retrieval.store.tables import Tables

PUBLISH = """
import sys
from vlm.retrieval import VideoIndex
from vlm.retrieval.store.publishing import publish
publish(VideoIndex.open(sys.argv[1]), sys.argv[2], group_size=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def movie_index(tmp_path_factory, clip_writer, make_encoder):
    """An index with copies, a removed video, and thirteen segments that are alive."""
    folder, model = tmp_path_factory.mktemp("store"), make_encoder()
    red, green, blue, grey = (220, 20, 20), (20, 200, 20), (20, 20, 230), (120, 120, 120)
    clip_writer(folder / "v" / 'a\'s "odd".mp4', [(red, 8), (green, 8), (blue, 8)], texture=1)
    clip_writer(folder / "v" / "gone.mp4", [(red, 12)])
    clip_writer(folder / "v" / "grey.mp4", [(grey, 6)])
    clip_writer(folder / "v" / "pink.mp4", [((200, 90, 90), 8), (grey, 4)])
    shutil.copy(folder / "v" / 'a\'s "odd".mp4', folder / "v" / "copy.mp4")
    with (folder / "v" / "copy.mp4").open("ab") as file:
        file.write(b"\0\0\0\x08free")  # another file, the same footage
    index = VideoIndex.create(folder / "i", model)
    index.add([folder / "v"], model=model)
    index.remove([str(folder / "v" / "gone.mp4")])
    return index.folder


@pytest.fixture
def own(tmp_path, movie_index):
    """A copy of it that a test may change."""
    return VideoIndex.open(shutil.copytree(movie_index, tmp_path / "index"))


@pytest.fixture
def stored(tmp_path, own):
    """That copy, published in three groups or more."""
    uri = str(tmp_path / "store")
    publish(own, uri, group_size=6)
    return uri


def searches(video_id):
    moment = Moment(video_id, 8.0)
    for text in ("red", "green", "blue", "grey"):
        yield text, {}
    yield "red", {"top_k": 1}
    yield "red", {"top_k": 2, "offset": 1}
    yield "red", {"aggregate": "mean"}
    yield "green", {"min_strength": "weak"}
    yield "green", {"min_strength": "strong", "group": False}
    yield "red", {"group": False}
    yield "red", {"where": "duration_s > 7 and not path like '%PINK%'"}
    yield "red", {"where": "path like '%a''s \"odd\"%' or num_segments in (1, 2)"}
    yield "red", {"where": "duration_s > 1e9"}
    yield "red", {"where": "width = '32' or path > 5"}
    yield "blue", {"unlike": [moment]}
    yield moment, {}
    yield Mix((Part("red"), Part(moment, 0.5), Part("grey", -0.5))), {"top_k": 3}


@pytest.mark.parametrize("group_size", [6, 1000])
def test_hits_are_those_of_the_exact_searcher(tmp_path, own, make_encoder, group_size):
    report = publish(own, str(tmp_path / "s"), group_size=group_size)
    assert (report.num_groups > 2) == (group_size == 6)
    exact, store = (
        Searcher(own, make_encoder(), backend="exact"),
        StoreSearcher(str(tmp_path / "s"), make_encoder()),
    )
    some = exact.search("green")
    assert len(some) == 3 and any(hit.duplicates for hit in some)
    num_found = 0
    for query, options in searches(some[0].video_id):
        expected = exact.search(query, **options)
        assert store.search(query, **options) == expected, (query, options)
        num_found += len(expected)
    assert num_found > 30


def test_pages_agree_and_say_whether_more_follows(own, stored, make_encoder):
    exact, store = Searcher(own, make_encoder(), backend="exact"), StoreSearcher(stored, make_encoder())
    for offset in range(4):
        options = SearchOptions(top_k=1, offset=offset)
        encoded = exact.encode("red")
        assert store.page(encoded, options) == exact.page(encoded, options)


def test_many_near_equal_vectors_are_told_apart(tmp_path, monkeypatch):
    """Half precision of the query mixes up neighbours by far more than the margin that is asked for."""
    generator = np.random.default_rng(1)
    centre = generator.normal(size=32)
    vectors = (centre + generator.normal(size=(3000, 32)) * 2e-3).astype(np.float16)
    vectors[100:200] = vectors[0]
    store = made_up_store(tmp_path, vectors, 1000)
    queries = np.stack([centre, centre * 1e6, vectors[0].astype(float), np.zeros(32)]).astype(np.float32)
    allowed = generator.random(3000) < 0.5
    for fits in (None, allowed, np.arange(3000) == 7, np.zeros(3000, bool)):
        for limit in (20_000, 3):
            monkeypatch.setattr("vlm.retrieval.store.search._MAX_LISTED", limit)
            scores, rows = StoreBackend(store).search(queries, 10, fits)
            for place, query in enumerate(queries):
                truth = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
                open_rows = np.arange(3000) if fits is None else np.flatnonzero(fits)
                best = open_rows[np.lexsort((open_rows, -truth[open_rows]))][:10]
                assert rows[place, : len(best)].tolist() == best.tolist()
                assert scores[place, : len(best)].tolist() == truth[best].tolist()
                assert (rows[place, len(best) :] == -1).all()


def made_up_store(folder, vectors, group_size):
    """Return what `StoreBackend` needs of a store, over Lance tables with these vectors."""
    from types import SimpleNamespace

    from vlm.retrieval.store.description import TableState, group_name
    from vlm.retrieval.store.publishing import _segments

    tables, groups, states = Tables(str(folder / "made-up")), {}, {}
    for number, first in enumerate(range(0, len(vectors), group_size)):
        rows = np.arange(first, first + group_size)
        groups[number] = tables.write(group_name(number), _segments(rows, vectors[rows]))
        largest = float(np.linalg.norm(vectors[rows].astype(float), axis=1).max())
        states[group_name(number)] = TableState(
            name=group_name(number), version=1, num_rows=group_size, largest_norm=largest
        )
    return SimpleNamespace(
        manifest=SimpleNamespace(features=SimpleNamespace(dim=vectors.shape[1])),
        snapshot=SimpleNamespace(alive=np.ones(len(vectors), bool)),
        state=SimpleNamespace(group_size=group_size, table=states.get),
        groups=groups,
    )


def test_publishing_again_writes_what_differs(tmp_path, own, stored, clip, colours, make_encoder):
    model = make_encoder()
    store = StoreSearcher(stored, model)
    versions = {table.name: table.version for table in read_manifest(Tables(stored)).tables}
    clip(tmp_path / "new.mp4", [(colours.blue, 8)])
    own.add([tmp_path / "new.mp4"], model=model)
    own.remove([Searcher(own, model, backend="exact").search("red")[0].video_id])
    report = publish(own, stored)
    assert (report.generation, report.num_added) == (2, 1)
    assert report.num_removed == 5
    now = {table.name: table.version for table in read_manifest(Tables(stored)).tables}
    assert any(now.get(name) == version for name, version in versions.items() if name.startswith("group"))
    exact = Searcher(own, model, backend="exact")
    assert store.search("blue") != exact.search("blue")  # it holds the generation that it opened
    store.refresh()
    for text in ("red", "blue"):
        assert store.search(text) == exact.search(text)


def test_a_renamed_file_moves_no_vector(tmp_path, clip, colours, make_encoder):
    model = make_encoder()
    clip(tmp_path / "v" / "before.mp4", [(colours.red, 8)])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([tmp_path / "v"], model=model)
    publish(index, str(tmp_path / "s"))
    (tmp_path / "v" / "before.mp4").rename(tmp_path / "v" / "after.mp4")
    index.update(model=model)
    report = publish(index, str(tmp_path / "s"))
    assert (report.num_added, report.num_removed) == (0, 0)
    (hit,) = StoreSearcher(str(tmp_path / "s"), model).search("red")
    assert os.path.basename(hit.path) == "after.mp4"


def test_a_compacted_index_is_written_again(own, stored, make_encoder):
    from vlm.retrieval.upkeep.compaction import compact

    compact(own)
    own.refresh()
    report = publish(own, stored)
    assert report.num_added == report.num_segments
    expected = Searcher(own, make_encoder(), backend="exact").search("red")
    assert StoreSearcher(stored, make_encoder()).search("red") == expected


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(params=["store-after-group:1", "store-after-group:2", "store-before-manifest", "SIGKILL"])
def killed_publish(request, root, monkeypatch):
    """Publish until a point; once in a process that is truly killed there."""

    def publish_and_die(index, uri):
        if request.param == "SIGKILL":
            command = [sys.executable, "-c", PUBLISH, str(index.folder), uri, "6"]
            environment = {**os.environ, "PYTHONPATH": str(root), "CRASH_AT": "store-before-manifest"}
            assert subprocess.run(command, env=environment, check=False).returncode == -9
            return
        wanted, _, count = request.param.partition(":")
        reached = []

        def die(name):
            reached.append(name)
            if reached.count(wanted) == int(count or 1):
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("vlm.retrieval.store.publishing.crash_point", die)
            publish(index, uri)

    return publish_and_die


def test_a_killed_publication_leaves_the_old_generation(
    tmp_path, own, stored, clip, colours, killed_publish, make_encoder
):
    model = make_encoder()
    before = StoreSearcher(stored, model).search("red")
    clip(tmp_path / "new.mp4", [(colours.red, 30)])
    own.add([tmp_path / "new.mp4"], model=model)
    own.remove([before[0].video_id])
    killed_publish(own, stored)
    assert StoreSearcher(stored, model).search("red") == before
    publish(own, stored, safe_age_s=0)
    assert StoreSearcher(stored, model).search("red") == Searcher(own, model, backend="exact").search("red")


def test_readers_search_while_generations_come(tmp_path, own, stored, clip, colours, make_encoder):
    model, failures, num_done, is_over = make_encoder(), [], [0], threading.Event()
    searcher = StoreSearcher(stored, model)

    def read():
        while not is_over.is_set():
            try:
                searcher.refresh()
                hits = searcher.search("red", where="duration_s > 1")
                assert hits and hits[0].score > 0.3
                num_done[0] += 1
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(3):
        clip(tmp_path / f"{number}.mp4", [(colours.red, 8)])
        own.add([tmp_path / f"{number}.mp4"], model=make_encoder())
        publish(own, stored)
    is_over.set()
    thread.join()
    assert not failures
    assert num_done[0] > 0


def test_old_versions_go_when_every_reader_had_the_time(own, stored):
    def size():
        tables = Tables(stored)
        return {
            state.name: len(tables.open(state.name)._table.list_versions())
            for state in read_manifest(tables).tables
        }

    own.remove([own.snapshot.videos[0].video_id])
    publish(own, stored)
    held = Store(stored)
    kept = size()
    assert max(kept.values()) > 1
    publish(own, stored)  # too young
    assert size() == kept
    publish(own, stored, safe_age_s=0.001)
    assert max(size().values()) == 1
    assert held.groups[1].count() == Store(stored).groups[1].count()


def test_what_a_store_lacks_is_refused(stored, make_encoder):
    store = StoreSearcher(stored, make_encoder())
    with pytest.raises(CapabilityError, match="published store, which has no reranking"):
        store.search("red", rerank=2)
    with pytest.raises(CapabilityError, match="has no words"):
        store.search("red", words=True)
    with pytest.raises(InvalidInput, match="made by model 'colours'"):
        StoreSearcher(stored, make_encoder(fingerprint="other" * 4))


@pytest.mark.parametrize(
    "text",
    ["1=1; drop table videos", "path = '' or segment > 0", "segment IN (1)", "path like '%' --", "row=1"],
)
def test_hostile_filters_never_reach_a_table(stored, make_encoder, monkeypatch, text):
    seen = []
    monkeypatch.setattr("vlm.retrieval.store.tables.Table.nearest", lambda *values: seen.append(values))
    with pytest.raises(InvalidInput, match="filter"):
        StoreSearcher(stored, make_encoder()).search("red", where=text)
    assert not seen


def test_strings_of_a_filter_are_only_compared(own, stored, make_encoder):
    where = "path = 'x'') OR 1=1 --' or codec = '; DROP TABLE videos'"
    assert StoreSearcher(stored, make_encoder()).search("red", where=where) == []
    assert StoreSearcher(stored, make_encoder()).search("red")


def test_a_place_without_a_store_is_named(tmp_path, make_encoder):
    with pytest.raises(InvalidInput, match="no published index there; run vlm index publish"):
        StoreSearcher(str(tmp_path / "nothing"), make_encoder())


def test_a_torn_manifest_is_named_and_mended(own, stored, make_encoder):
    import pyarrow

    Tables(stored).write(MANIFEST, pyarrow.table({"content": ['{"format": "vlm'], "sha256": ["0" * 64]}))
    with pytest.raises(IntegrityError, match="manifest is damaged"):
        StoreSearcher(stored, make_encoder())
    publish(own, stored, group_size=6)
    assert StoreSearcher(stored, make_encoder()).search("red")


def test_a_missing_group_is_named_and_mended(tmp_path, own, stored, make_encoder):
    shutil.rmtree(tmp_path / "store" / "group-0001.lance")
    with pytest.raises(IntegrityError, match="group-0001"):
        StoreSearcher(stored, make_encoder())
    publish(own, stored)
    assert StoreSearcher(stored, make_encoder()).search("red")


def test_another_models_store_is_not_overwritten(tmp_path, stored, movies, make_encoder):
    other = make_encoder(fingerprint="other" * 4)
    index = VideoIndex.create(tmp_path / "other", other)
    index.add([movies / "grey.mp4"], model=other)
    with pytest.raises(InvalidInput, match="choose another place"):
        publish(index, stored)


def test_one_publishes_at_a_time(own, stored):
    from vlm.retrieval.durability import WriterLock

    with WriterLock(own.folder.parent / "store"), pytest.raises(BusyError, match="being written"):
        publish(own, stored)


def test_commands_publish_and_search(tmp_path, own, call_vlm):
    uri = str(tmp_path / "shop")
    code, output, _ = call_vlm(
        "index", "publish", str(own.folder), "--to", uri, "--group-size", "6", "--json"
    )
    assert code == 0
    assert json.loads(output)["num_videos"] == 4
    found = [
        call_vlm("search", place, "red", "--backend", backend, "--where", "duration_s > 7", "--json")
        for place, backend in ((uri, "lance"), (str(own.folder), "exact"))
    ]
    assert found[0][0] == 0 and found[0][1] == found[1][1] and len(json.loads(found[0][1])) == 2
