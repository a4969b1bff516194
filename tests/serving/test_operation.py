"""A server under load and at its end: it sheds what it cannot do, recovers, tells how it is, and stops."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest

from vlm.serving.openapi import document
from vlm.serving.server import listen
from vlm.serving.settings import Limits


@pytest.fixture
def narrow(index, serving, tmp_path):
    """One search at a time, two in line, and patience of two seconds."""
    limits = Limits(num_searches=1, max_waiting=2, timeout_s=2.0, body_timeout_s=0.5)
    with serving(index, tmp_path / "cache", limits=limits) as site:
        yield site


def test_overload_is_answered_503_and_passes(index, serving, tmp_path, monkeypatch) -> None:
    limits = Limits(num_searches=1, max_waiting=2, timeout_s=120.0)
    with serving(index, tmp_path / "cache", limits=limits) as site, ThreadPoolExecutor(12) as pool:
        searcher = site.state.service.library.searcher
        release, real = threading.Event(), type(searcher).page
        monkeypatch.setattr(type(searcher), "page", lambda *a, **k: (release.wait(100), real(*a, **k))[1])
        assert site.post("/api/search", {"query_id": "x"}).status == 410
        replies = [pool.submit(site.post, "/api/search", {"text": "red"}) for _ in range(12)]
        # nothing is released before: these were turned away, while what needs no search is answered
        refused = [reply.result() for reply in islice(as_completed(replies), 8)]
        assert site.get("/healthz").status == 200 and not release.is_set()
        release.set()
        done = [reply.result() for reply in replies]
        assert {reply.status for reply in refused} == {503} and {reply.status for reply in done} == {200, 503}
        for reply in refused:
            assert reply.headers["retry-after"] == "1" and reply.json["error"]["code"] == "overloaded"
        assert site.post("/api/search", {"text": "red"}).status == 200
        assert site.state.service.scanner.depth == 0


def test_a_search_that_hangs_is_given_up_and_keeps_its_place(narrow, monkeypatch) -> None:
    searcher = narrow.state.service.library.searcher
    release, real = threading.Event(), type(searcher).page
    monkeypatch.setattr(type(searcher), "page", lambda *a, **k: (release.wait(20), real(*a, **k))[1])
    started = time.monotonic()
    reply = narrow.post("/api/search", {"text": "red"})
    assert reply.status == 503 and "longer than 2 s" in reply.json["error"]["message"]
    assert time.monotonic() - started < 5
    assert narrow.state.service.scanner.depth == 1
    release.set()
    time.sleep(0.3)
    assert narrow.post("/api/search", {"text": "red"}).status == 200


@pytest.mark.parametrize("shares", [True, False])
def test_searches_that_share_nothing_run_two_at_a_time(index, serving, tmp_path, monkeypatch, shares) -> None:
    monkeypatch.setattr("vlm.retrieval.queries.searching.SnapshotSearcher.shares_passes", shares)
    now, most, lock = [0], [0], threading.Lock()
    with serving(index, tmp_path / "cache") as site:
        real = type(site.state.service.library.searcher).page

        def page(*arguments):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.1)
            with lock:
                now[0] -= 1
            return real(*arguments)

        monkeypatch.setattr(type(site.state.service.library.searcher), "page", page)
        site.post("/api/search", {"text": "red"})
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: site.post("/api/search", {"text": "red"}), range(12)))
    assert {reply.status for reply in replies} == {200}
    assert most[0] > 2 if shares else most[0] == 2


def test_what_is_new_is_found_while_the_structure_is_made_anew(
    films, model, model_source, serving, write_clip, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("faiss")
    from vlm.retrieval import VideoIndex
    from vlm.retrieval.backends.structured import FaissBackend

    monkeypatch.setattr("vlm.retrieval.backends.plan.FLAT_ROWS", 30)
    index = VideoIndex.create(tmp_path / "index", model, source=model_source)
    index.add([films / "red then green.mp4", films / "blue.mp4"], model=model)
    release, began = threading.Event(), []
    real = FaissBackend._calibrate

    def calibrate(*arguments):
        began.append(1)
        assert release.wait(60)
        if len(began) == 1:
            raise MemoryError("of the first")
        return real(*arguments)

    def add(seconds: int) -> None:
        path = write_clip(tmp_path / f"{seconds}.mp4", [("green", seconds)])
        VideoIndex.open(index.folder).add([path], model=model)

    with serving(index.folder, tmp_path / "cache") as site:
        service = site.state.service
        assert not service.library.is_outgrown
        monkeypatch.setattr(FaissBackend, "_calibrate", calibrate)
        add(120)
        assert until(lambda: began)
        hits = site.post("/api/search", {"text": "green", "top_k": 50}).json["hits"]
        assert any(hit["path"].endswith("/120.mp4") for hit in hits)
        release.set()
        assert until(lambda: "index_renewal_failures_total 1" in site.get("/metrics").body.decode())
        time.sleep(2.5)
        assert len(began) == 1 and service.library.is_outgrown  # not again and again
        add(121)
        assert until(lambda: not service.library.is_outgrown and len(began) == 2)
        assert service.library.searcher._opened.plan.kind == "lists"
        hits = site.post("/api/search", {"text": "green", "top_k": 50}).json["hits"]
        assert {"120.mp4", "121.mp4"} <= {Path(hit["path"]).name for hit in hits}


def until(condition, seconds: float = 30.0) -> bool:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def test_slow_bodies_are_cut_off(narrow) -> None:
    lines = (
        "POST /api/search HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Content-Length: 9",
    )
    head = "\r\n".join((*lines, "", "{")).encode()
    with socket.create_connection((narrow.host, narrow.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_slow_heads_are_cut_off(narrow, monkeypatch) -> None:
    monkeypatch.setattr("vlm.serving.server._HEADER_S", 0.5)
    connections = []
    for _ in range(30):
        connection = socket.create_connection((narrow.host, narrow.port), timeout=10)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: lo")
        connections.append(connection)
    assert narrow.get("/healthz").status == 200
    assert [connection.recv(100) for connection in connections] == [b""] * 30
    for connection in connections:
        connection.close()


def test_metrics_count_what_happened(narrow, ids) -> None:
    for _ in range(3):
        narrow.post("/api/search", {"text": "red"})
    narrow.get("/api/videos/no-such-video/content")
    narrow.get("/nothing/" + "x" * 50)
    text = narrow.get("/metrics").body.decode()
    assert 'http_requests_total{method="POST",route="/api/search",status="200"} 3' in text
    assert 'route="/api/videos/{video_id}/content",status="404"} 1' in text
    assert 'query_cache_total{result="hit",kind="text"} 2' in text
    assert 'search_stage_seconds_count{stage="encode"} 1' in text
    assert "index_videos 6\n" in text and "index_generation " in text
    assert "xxxx" not in text and "no-such-video" not in text and "red" not in text.replace("redirect", "")
    for line in text.splitlines():
        assert re.fullmatch(
            r"# TYPE \w+ (counter|gauge|histogram)|\w+(\{[^{}]*(\{\w+\})?[^{}]*\})? [-+0-9.einf]+", line
        ), line
    buckets = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith('http_request_duration_seconds_bucket{route="/api/search"')
    ]
    assert buckets == sorted(buckets) and buckets[-1] == 3


def test_readiness_is_not_liveness(narrow) -> None:
    assert narrow.get("/readyz").status == 200
    narrow.state.is_draining = True
    assert narrow.get("/readyz").status == 503
    assert narrow.get("/healthz").status == 200


def test_the_description_lists_every_route_and_only_those(site) -> None:
    from vlm.serving.app import ROUTES

    described = site.get("/api/openapi.json").json
    found = {(path, method) for path, calls in described["paths"].items() for method in calls}
    assert found == {(r.path, m.lower()) for r in ROUTES for m in r.methods - {"HEAD"}}
    schemas = described["components"]["schemas"]
    text = str(described)
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= set(schemas)
    for path, calls in described["paths"].items():
        for call in calls.values():
            named = {p["name"] for p in call.get("parameters", []) if p["in"] == "path"}
            assert named == set(re.findall(r"\{(\w+)\}", path))


def test_answers_have_the_described_fields(site, ids) -> None:
    schemas = document(Limits())["components"]["schemas"]
    page = site.post("/api/search", {"text": "red"}).json
    assert set(page) == set(schemas["Page"]["properties"])
    assert set(page["hits"][0]) == set(schemas["Hit"]["properties"])
    answer = site.post("/api/ask", {"question": "red", "choices": ["red", "blue"]}).json
    assert set(answer) == set(schemas["Answer"]["properties"])
    error = site.post("/api/search", {}).json
    assert set(error["error"]) == set(schemas["Error"]["properties"]["error"]["properties"])


@pytest.fixture
def process(index, tmp_path, root):
    """The command, in a process of its own; yields it and its address."""
    command = [
        sys.executable,
        "-m",
        "vlm",
        "serve",
        str(index),
        "--port",
        "0",
        "--cache",
        str(tmp_path / "c"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = child.stdout.readline()
        assert line.startswith("serving "), child.stderr.read()
        yield child, line.split()[-1]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()


def children(parent: int) -> list[int]:
    """Return the processes that another one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def test_sigterm_ends_in_order(process, ids) -> None:
    from vlm import Client

    child, address = process
    client = Client(address)
    assert len(client.search("red")) == 6
    client.thumbnail(ids["blue"])  # so that there is a media worker to end
    workers = children(child.pid)
    assert workers
    slow = socket.create_connection(address.removeprefix("http://").split(":"), timeout=10)
    client.info()  # who connected before has been let in: a server that ends would not see it come
    started = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=15) == 0
    assert time.monotonic() - started < 10
    assert child.stderr.read() == ""
    slow.close()
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    with pytest.raises(OSError):
        socket.create_connection(address.removeprefix("http://").split(":"), timeout=2)


def test_mistakes_have_their_exit_codes(index, tmp_path, capsys) -> None:
    from vlm.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port, "--cache", str(tmp_path / "c")): (75, "is taken"),
            ("--port", "99999"): (2, "0 to 65535"),
            ("--host", "0.0.0.0"): (4, "--token-file"),
            ("--token-file", str(tmp_path / "absent")): (4, "token file"),
            ("--ingest", str(tmp_path / "absent")): (4, "no such folder"),
            ("--host", "not.a.host.invalid", "--allow-no-token", "--cache", str(tmp_path / "c")): (
                4,
                "cannot listen",
            ),
        }
        for flags, (code, words) in cases.items():
            assert main(["serve", str(index), *flags]) == code, flags
            assert words in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing")]) == 4
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", str(index), "--token-file", str(tmp_path / "empty")]) == 4


def test_without_its_libraries_the_command_says_what_to_install(index, monkeypatch, capsys) -> None:
    import importlib.util

    from vlm.cli import main

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else real(name, *a)
    )
    assert main(["serve", str(index)]) == 4
    assert "pip install 'videomamba-vlm[serve]'" in capsys.readouterr().err


def test_the_client_is_light() -> None:
    code = (
        "import sys, vlm; vlm.Client('http://127.0.0.1:1'); "
        "print([m for m in ('torch', 'numpy', 'starlette', 'uvicorn', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_answers_are_sent_at_once() -> None:
    """With Nagle's algorithm a body waits for the acknowledgement of its head, 40 ms on Linux."""
    seen: list[int] = []

    async def accept() -> None:
        done = asyncio.Event()

        def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            seen.append(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            done.set()

        with listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(note, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                await asyncio.wait_for(done.wait(), 10)
                writer.close()

    asyncio.run(accept())
    assert seen == [1]
