"""Servers over a published store: an index's hits, and nothing that a store cannot give."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("lancedb")

from vlm.cli import main
from vlm.errors import InvalidInput, UsageError
from vlm.retrieval import VideoIndex
from vlm.retrieval.store.publishing import publish
from vlm.serving.settings import ServeSettings
from vlm.serving.state import check_for_store, open_state


@pytest.fixture(scope="module")
def store(index, tmp_path_factory):
    """`index`, published in several groups; tests must not change it."""
    uri = str(tmp_path_factory.mktemp("published") / "store")
    assert publish(VideoIndex.open(index), uri, group_size=3).num_groups > 2
    return uri


@pytest.fixture(scope="module")
def replicas(store, serving, tmp_path_factory):
    """Two servers over `store`."""
    caches = [tmp_path_factory.mktemp("cache") for _ in range(2)]
    with (
        serving(store, caches[0], backend="lance") as first,
        serving(store, caches[1], backend="lance") as second,
    ):
        yield first, second


@pytest.fixture
def own(tmp_path, serving, model, model_source, write_clip):
    """An index of one clip, its store, and a server over that which looks for news only when told."""
    write_clip(tmp_path / "films" / "a.mp4", [("red", 5)])
    index = VideoIndex.create(tmp_path / "index", model, source=model_source)
    index.add([tmp_path / "films"], model=model)
    publish(index, str(tmp_path / "store"))
    with serving(str(tmp_path / "store"), tmp_path / "cache", backend="lance") as site:
        yield site, index


def asked(ids):
    """Requests, each a path and a body."""
    for text in ("red thing", "a green thing moves left", "blue"):
        yield "/api/search", {"text": text, "top_k": 10}
    yield "/api/search", {"text": "red", "top_k": 2, "offset": 1}
    yield "/api/search", {"text": "red", "group": False, "top_k": 10}
    yield "/api/search", {"text": "red", "where": "duration_s > 5 and not path like '%BLUE%'"}
    yield "/api/search", {"text": "red", "unlike": [{"video_id": ids["blue"], "start_s": 0}]}
    yield "/api/search", {"parts": [{"text": "red"}, {"video_id": ids["grey"], "start_s": 0, "weight": -0.5}]}
    yield "/api/similar", {"video_id": ids["red"], "start_s": 8}
    yield "/api/similar", {"video_id": ids["blue"], "start_s": 0, "top_k": 2, "offset": 1}


def test_replicas_give_the_hits_of_the_index(index, ids, serving, replicas, tmp_path) -> None:
    num_hits = 0
    with serving(index, tmp_path / "cache", backend="exact") as site:
        for path, body in asked(ids):
            expected = site.post(path, body)
            assert expected.status == 200, expected.body
            num_hits += len(expected.json["hits"])
            for replica in replicas:
                assert replica.post(path, body).json == expected.json, (path, body)
    assert num_hits > 20


def test_searches_at_once_get_each_their_own_hits(ids, replicas) -> None:
    calls = [(site, path, body) for path, body in asked(ids) for site in replicas]
    alone = [site.post(path, body).json["hits"] for site, path, body in calls]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(site.post, path, body) for site, path, body in calls]
    assert [future.result().json["hits"] for future in futures] == alone


def test_what_is_served_is_told(store, site, index, replicas) -> None:
    for replica in replicas:
        about = replica.get("/api/info").json
        assert about["is_store"] and about["path"] == store and about["num_groups"] > 2
        assert about["num_videos"] == 6 and about["ingest_folders"] == []
        assert "rerank" not in about["capabilities"] and "search" in about["capabilities"]
        assert replica.get("/readyz").status == 200
    about = site.get("/api/info").json
    assert not about["is_store"] and "rerank" in about["capabilities"]


def test_a_store_has_no_reranking_and_no_words(replicas) -> None:
    for wanted in ({"rerank": 2}, {"words": True}):
        reply = replicas[0].post("/api/search", {"text": "red", **wanted})
        assert (reply.status, reply.json["error"]["code"]) == (422, "capability")
        what = "reranking" if "rerank" in wanted else "words"
        assert f"is a published store, which has no {what}" in reply.json["error"]["message"]


def test_a_question_is_answered_by_the_nearest_moment(replicas) -> None:
    reply = replicas[0].post("/api/ask", {"question": "what is red", "choices": ["a thing", "green"]})
    assert reply.status == 200, reply.body
    assert reply.json["evidence"]["score_kind"] == "itc" and len(reply.json["choices"]) == 2


def test_nothing_is_indexed_into_a_store(store, replicas, tmp_path, model, model_source, capsys) -> None:
    assert replicas[0].get("/api/ingest").json == {"folders": [], "jobs": []}
    assert replicas[0].post("/api/ingest", {"folder": "films"}).status == 404
    code = main(["serve", store, "--backend", "lance", "--ingest", str(tmp_path)])
    said = capsys.readouterr().err
    assert code == 2 and "published store" in said and "vlm index publish" in said
    settings = ServeSettings(cache_folder=tmp_path / "cache", ingest_folders={"films": tmp_path})
    with pytest.raises(UsageError, match="leave --ingest out"):
        open_state(store, model, model_source, settings, "lance")


def test_the_command_opens_what_it_is_given(store, tmp_path, monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr("vlm.serving.server.serve", lambda state, announce: seen.append(state))
    words = ["--backend", "lance", "--cache", str(tmp_path / "cache")]
    assert main(["serve", store, *words]) == 0
    library = seen[0].service.library
    assert library.is_store and len(library.videos) == 6
    assert main(["serve", str(tmp_path / "nothing"), *words]) == 4
    assert "no published index there" in capsys.readouterr().err
    assert main(["serve", store, "--cache", str(tmp_path / "cache")]) == 4  # a store is no index folder
    assert main(["serve", store, "--backend", "lance", "--cache", f"{store}/cache"]) == 4
    assert "outside the store" in capsys.readouterr().err and len(seen) == 1


def test_the_cache_lies_elsewhere(store, tmp_path) -> None:
    (tmp_path / "link").symlink_to(store)
    for cache in (f"{store}/cache", tmp_path / "link" / "cache"):
        for uri in (store, f"file://{store}"):
            with pytest.raises(InvalidInput, match="outside the store"):
                check_for_store(uri, ServeSettings(cache_folder=type(tmp_path)(cache)))
    check_for_store(store, ServeSettings(cache_folder=tmp_path))
    check_for_store("s3://bucket/store", ServeSettings(cache_folder=tmp_path))


def test_files_are_served_where_they_can_be_reached(own, tmp_path) -> None:
    site, index = own
    (video,) = index.snapshot.videos
    content = site.get(f"/api/videos/{video.video_id}/content")
    assert content.status == 200
    assert content.body == (tmp_path / "films" / "a.mp4").read_bytes()
    (tmp_path / "films").rename(tmp_path / "elsewhere")
    gone = site.get(f"/api/videos/{video.video_id}/content")
    assert (gone.status, gone.json["error"]["code"]) == (404, "not_found")
    assert len(site.post("/api/search", {"text": "red"}).json["hits"]) == 1


def test_a_publication_is_taken_up_and_only_then_is_the_store_read(
    own, tmp_path, model, write_clip, monkeypatch
) -> None:
    site, index = own
    opened = []
    real = type(site.state.service.library.searcher)._open
    monkeypatch.setattr(
        "vlm.retrieval.store.searcher.StoreSearcher._open", lambda *a: (opened.append(1), real(*a))
    )
    assert len(site.post("/api/search", {"text": "blue", "top_k": 9}).json["hits"]) == 1
    assert not site.state.service.refresh() and not opened
    write_clip(tmp_path / "films" / "b.mp4", [("blue", 5)])
    index.add([tmp_path / "films"], model=model)
    publish(index, str(tmp_path / "store"))
    before = site.state.service.library
    end = time.monotonic() + 60
    while site.state.service.library is before and time.monotonic() < end:
        time.sleep(0.05)
    page = site.post("/api/search", {"text": "blue", "top_k": 9}).json
    assert len(page["hits"]) == 2 and page["generation"] == index.snapshot.generation.id
    assert len(opened) == 1
    assert len(before.videos) == 1  # who held it keeps it


def test_a_store_that_vanished_is_not_ready_and_comes_back(own, tmp_path) -> None:
    site, index = own
    (tmp_path / "store").rename(tmp_path / "away")
    ready = site.get("/readyz")
    assert (ready.status, ready.json["error"]["code"]) == (503, "index")
    search = site.post("/api/search", {"text": "a red thing"})
    assert (search.status, search.json["error"]["code"]) == (503, "store")
    assert search.headers["retry-after"] and os.fspath(tmp_path) not in search.body.decode()
    assert site.get("/healthz").status == 200
    (tmp_path / "away").rename(tmp_path / "store")
    assert site.get("/readyz").status == 200
    assert len(site.post("/api/search", {"text": "a red thing"}).json["hits"]) == 1


def test_a_server_whose_versions_were_removed_goes_on_to_the_newest(own, tmp_path, model, write_clip) -> None:
    site, index = own
    site.state.service.try_refresh = lambda: None  # it is cut off meanwhile
    for name in ("b", "c"):
        write_clip(tmp_path / "films" / f"{name}.mp4", [("blue", 5)])
        index.add([tmp_path / "films"], model=model)
        publish(index, str(tmp_path / "store"), safe_age_s=0.001)
    index.remove([str(tmp_path / "films" / "a.mp4")])
    publish(index, str(tmp_path / "store"), safe_age_s=0.001)
    reply = site.post("/api/search", {"text": "a red thing", "top_k": 9})
    assert (reply.status, reply.json["error"]["code"]) == (503, "store")
    assert site.state.service.refresh()
    assert len(site.post("/api/search", {"text": "a red thing", "top_k": 9}).json["hits"]) == 2


def test_a_store_that_was_made_anew_is_opened_anew(own, tmp_path, model, write_clip) -> None:
    site, index = own
    shutil.rmtree(tmp_path / "store")
    write_clip(tmp_path / "films" / "b.mp4", [("blue", 5)])
    index.add([tmp_path / "films"], model=model)
    assert publish(index, str(tmp_path / "store")).generation == 1
    site.state.service.refresh()
    assert len(site.post("/api/search", {"text": "blue", "top_k": 9}).json["hits"]) == 2
