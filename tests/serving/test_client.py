"""The client against servers that cut their answers, are busy, or are something else altogether."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from vlm import Client
from vlm.errors import BusyError, DataError, InvalidInput
from vlm.serving.schemas import hit_values
from vlm.types import Hit, Segment

BUSY = b'HTTP/1.1 503 Busy\r\nContent-Length: 48\r\n\r\n{"error": {"code": "overloaded", "message": "b"}}'
PLACE = {"video_id": "v", "path": "v.mp4", "start_s": 0.0, "end_s": 1.0}


def good(content: bytes, announced: int | None = None, status: str = "200 OK") -> bytes:
    size = len(content) if announced is None else announced
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + content


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the first line and the body of a request."""
    content = b""
    while b"\r\n\r\n" not in content:
        content += connection.recv(1 << 16)
    head, _, body = content.partition(b"\r\n\r\n")
    sizes = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length:" in line]
    while len(body) < sum(sizes):
        body += connection.recv(1 << 16)
    return head.partition(b"\r\n")[0], body


@pytest.fixture
def standin() -> Iterator[Callable[..., SimpleNamespace]]:
    """A server that gives these answers, byte for byte, one to each connection; notes what was asked."""
    listeners, threads = [], []

    def serve(*answers: bytes) -> SimpleNamespace:
        listener, asked = socket.create_server(("127.0.0.1", 0)), []
        listener.settimeout(20)

        def run() -> None:
            for answer in answers:
                with listener.accept()[0] as connection:
                    asked.append(read_request(connection))
                    connection.sendall(answer)

        threads.append(threading.Thread(target=run))
        listeners.append(listener)
        threads[-1].start()
        return SimpleNamespace(address=f"http://127.0.0.1:{listener.getsockname()[1]}", asked=asked)

    yield serve
    for thread in threads:
        thread.join(30)
    for listener in listeners:
        listener.close()


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(bytes(range(256)) * 1000)
    return path


def test_a_download_that_is_cut_leaves_nothing(standin, tmp_path) -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n9\r\nab"
    for answer, words in ((good(b"abc", 100), "after 3 of 100 bytes"), (chunks, "the answer broke off")):
        with pytest.raises(InvalidInput, match=words):
            Client(standin(answer).address).download("v", tmp_path / "v.mp4")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_whole_download_has_its_name_and_replaces_nothing(
    standin, tmp_path, monkeypatch, has_links
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    place, server = tmp_path / "v.mp4", standin(good(b"abc"), good(b"other"))
    assert Client(server.address).download("v", place) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"] and place.read_bytes() == b"abc"
    with pytest.raises(FileExistsError, match=r"v\.mp4"):
        Client(server.address).download("v", place)
    assert len(server.asked) == 1  # what cannot be written is not asked for
    # something of that name comes while the file is on its way
    monkeypatch.setattr(os, "fsync", lambda _: (tmp_path / "late.mp4").write_bytes(b"mine"))
    with pytest.raises(FileExistsError, match=r"late\.mp4"):
        Client(server.address).download("v", tmp_path / "late.mp4")
    assert (tmp_path / "late.mp4").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


CALLS = {
    "search": lambda client, clip: client.search("red"),
    "upload": lambda client, clip: client.search(clip),
    "ask": lambda client, clip: client.ask("red"),
    "star": lambda client, clip: client.star("red", Segment(**PLACE)),
    "starred": lambda client, clip: client.starred(),
    "unstar": lambda client, clip: client.unstar("k"),
    "info": lambda client, clip: client.info(),
    "thumbnail": lambda client, clip: client.thumbnail("v"),
    "download": lambda client, clip: client.download("v", clip.with_name("new.mp4")),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_answer_that_is_cut_is_told(standin, clip, call) -> None:
    with pytest.raises(InvalidInput, match="broke off.*; try again"):
        CALLS[call](Client(standin(good(b'{"a', 100)).address), clip)


@pytest.mark.parametrize("call", ["search", "upload", "ask", "starred"])
@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"hits": 3, "queries": 3, "evidence": 3, "choices": 3, "query_id": []}',
        b'{"hits": [{"rank": 1}], "queries": null, "evidence": {"duplicates": []}, "choices": []}',
        b'{"hits": [[]], "queries": null, "evidence": [], "choices": []}',
    ],
)
def test_an_answer_of_another_shape_is_told(standin, clip, call, answer) -> None:
    with pytest.raises(InvalidInput, match="not what this client knows.*of one version"):
        CALLS[call](Client(standin(good(answer)).address), clip)


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"thumbnail", "download"}))
def test_an_answer_of_something_else_is_told(standin, clip, call) -> None:
    with pytest.raises(InvalidInput, match="no JSON .*is it vlm serve"):
        CALLS[call](Client(standin(good(b"<html>Welcome</html>")).address), clip)
    with pytest.raises(InvalidInput, match="expected a JSON object, got list; is it vlm serve"):
        CALLS[call](Client(standin(good(b"[]")).address), clip)
    with pytest.raises(InvalidInput, match="no answer .*is vlm serve running"):
        CALLS[call](Client(standin(b"220 mail.example ESMTP\r\n").address), clip)


def test_an_error_that_is_cut_counts_by_its_status(standin) -> None:
    chunks = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab"
    for answer in (good(b'{"err', 100, "503 Busy"), chunks, good(b"<html>", status="503 Busy")):
        with pytest.raises(BusyError, match="answered 503"):
            Client(standin(answer).address, retries=0).info()


@pytest.mark.parametrize("call", CALLS)
def test_all_calls_come_back_when_the_server_is_busy(standin, clip, monkeypatch, call) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    first = {"upload": b'{"query_id": "q"}', "starred": b'{"queries": []}', "search": b'{"hits": []}'}
    evidence = hit_values(Hit(rank=1, score=1.0, score_kind="itc", **PLACE))
    first["ask"] = json.dumps({"evidence": evidence, "choices": []}).encode()
    answers = [good(first.get(call, b"{}"))]
    answers += [good(b'{"hits": []}')] if call == "upload" else []
    server = standin(BUSY, BUSY, *answers)
    CALLS[call](Client(server.address, retries=2), clip)
    assert len(server.asked) == 2 + len(answers)
    assert server.asked[0] == server.asked[1] == server.asked[2]
    assert call != "upload" or server.asked[0][1] == clip.read_bytes()
    server = standin(BUSY, BUSY)
    clip.with_name("new.mp4").unlink(missing_ok=True)
    with pytest.raises(BusyError):
        CALLS[call](Client(server.address, retries=1), clip)
    assert len(server.asked) == 2


def test_what_is_no_file_is_not_sent(tmp_path) -> None:
    client = Client("http://127.0.0.1:9", timeout_s=2)
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4"):
        with pytest.raises(DataError, match="expected a picture or video file") as caught:
            client.search(path)
        assert caught.value.reason == "not_a_file"
    with pytest.raises(DataError, match="cannot be read"):
        client.search(tmp_path / ("x" * 300))


def test_a_large_upload_comes_back_to_a_busy_server(site, tmp_path, monkeypatch) -> None:
    (tmp_path / "large.mp4").write_bytes(b"no video" * (2 << 20))
    site.state.num_uploads += site.state.limits.max_uploads
    waits, sleep = [], time.sleep

    def leave(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)
            site.state.num_uploads = 0
        sleep(seconds)

    monkeypatch.setattr("time.sleep", leave)
    with pytest.raises(DataError, match="video"):
        Client(site.address).search(tmp_path / "large.mp4")
    assert waits == [0.2] and site.state.num_uploads == 0
