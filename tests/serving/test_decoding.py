"""Decoding for the model: beside the model, so that nobody's text waits for somebody's film."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pkgutil import resolve_name

import pytest

from vlm.serving.settings import Limits


@pytest.fixture(scope="module")
def bare(films, model, model_source, tmp_path_factory):
    """An index without stored tokens: reranking has to see the segments again."""
    from vlm.retrieval import VideoIndex

    folder = tmp_path_factory.mktemp("bare") / "index"
    made = VideoIndex.create(folder, model, source=model_source, store_tokens="none")
    made.add([films / "red then green.mp4", films / "blue.mp4"], model=model)
    return folder


@pytest.mark.parametrize(
    ("which", "decoding", "what"),
    [
        ("index", "vlm.retrieval.queries.encoding.decode_one", "upload"),
        ("index", "vlm.answering.evidence.decode_one", "choose"),
        ("bare", "vlm.retrieval.rerank.decode_files", "rerank"),
        ("bare", "vlm.retrieval.rerank.decode_files", "ask"),
    ],
)
def test_texts_are_searched_while_a_video_is_decoded(
    request, serving, films, tmp_path, monkeypatch, which, decoding, what
) -> None:
    begun, release, real = (
        threading.Event(),
        threading.Event(),
        resolve_name(decoding.replace(".decode", ":decode")),
    )

    def wait(*arguments):
        begun.set()
        assert release.wait(60)
        return real(*arguments)

    monkeypatch.setattr(decoding, wait)

    def send(site):
        if what == "rerank":
            return site.post("/api/search", {"text": "a red thing", "rerank": 2})
        if what == "ask":
            return site.post("/api/ask", {"question": "a red thing"})
        if what == "choose":
            return site.post("/api/ask", {"question": "which", "choices": ["red", "blue"]})
        content = (films / "old.avi").read_bytes()
        return site.post("/api/search/video", content, Content_Type="video/x")

    index = request.getfixturevalue(which)
    limits = Limits(timeout_s=20.0)
    with serving(index, tmp_path / "cache", limits=limits) as site, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(send, site)
        try:
            assert begun.wait(30)
            # a text that nobody sent yet, so that it needs the model
            found = site.post("/api/search", {"text": "a green thing"})
            assert (found.status, slow.done(), release.is_set()) == (200, False, False)
            assert site.state.service.decoder.depth == 1
            assert 'queue_depth{queue="decoding"} 1' in site.get("/metrics").body.decode()
        finally:
            release.set()
        reply = slow.result(60)
        assert reply.status == 200, reply.body
        if what == "rerank":
            mine = site.state.service.library.searcher.search("a red thing", rerank=2)
            found = [(hit["video_id"], hit["score"], hit["score_kind"]) for hit in reply.json["hits"]]
            assert found == [(hit.video_id, hit.score, hit.score_kind) for hit in mine]
            assert found[0][2] == "itm+itc@2"
        assert site.state.service.decoder.depth == 0


def test_a_full_line_of_decoders_is_told_and_texts_go_on(
    index, serving, films, tmp_path, monkeypatch
) -> None:
    from vlm.retrieval.ingest.pool import decode_one

    release = threading.Event()
    monkeypatch.setattr(
        "vlm.retrieval.queries.encoding.decode_one", lambda *a: (release.wait(60), decode_one(*a))[1]
    )
    limits = Limits(num_decoders=1, max_waiting=1, timeout_s=20.0)
    with serving(index, tmp_path / "cache", limits=limits) as site, ThreadPoolExecutor(2) as pool:
        decoder = site.state.service.decoder
        content = (films / "old.avi").read_bytes()

        def send():
            return site.post("/api/search/video", content, Content_Type="video/x")

        slow = [pool.submit(send) for _ in range(2)]
        try:
            while decoder.depth < 2 and not any(reply.done() for reply in slow):
                time.sleep(0.01)
            refused = send()
            assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
            assert "for decoding" in refused.json["error"]["message"]
            assert site.post("/api/search", {"text": "a blue thing"}).status == 200
        finally:
            release.set()
        assert [reply.result(60).status for reply in slow] == [200, 200]
