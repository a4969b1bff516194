"""Decoding for the model: beside the model, so that nobody's text waits for somebody's film."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vlm.serving.settings import Limits


@pytest.mark.parametrize(
    ("module", "what"),
    [("vlm.retrieval.queries.encoding", "upload"), ("vlm.answering.evidence", "ask")],
)
def test_texts_are_searched_while_a_video_is_decoded(
    index, serving, films, tmp_path, monkeypatch, module, what
) -> None:
    from vlm.retrieval.ingest.pool import decode_one

    begun, release = threading.Event(), threading.Event()

    def wait(*arguments):
        begun.set()
        assert release.wait(60)
        return decode_one(*arguments)

    monkeypatch.setattr(f"{module}.decode_one", wait)

    def send(site):
        if what == "ask":
            return site.post("/api/ask", {"question": "which", "choices": ["red", "blue"]})
        content = (films / "old.avi").read_bytes()
        return site.post("/api/search/video", content, Content_Type="video/x")

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
