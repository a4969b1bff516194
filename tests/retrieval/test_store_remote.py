"""A store in an object store: an S3 service on this machine, spoken to as to any other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("lancedb")
pytest.importorskip("moto.server")

from vlm.cli import main
from vlm.errors import StoreError
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.store.publishing import publish
from vlm.retrieval.store.searcher import StoreSearcher

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Yield the URI of an empty bucket; the environment tells clients where its service is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    service = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ENDPOINT": endpoint, "ALLOW_HTTP": "true", "REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_ACCESS_KEY_ID", "reader")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        for _ in range(300):
            assert service.poll() is None
            try:
                request = urllib.request.Request(f"{endpoint}/videos", method="PUT")
                urllib.request.urlopen(request, timeout=10).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield "s3://videos"
    service.kill()
    service.wait()
    log.close()


@pytest.fixture
def own(tmp_path, clip, colours, make_encoder):
    """An index of two videos."""
    for name in ("red", "green"):
        clip(tmp_path / "v" / f"{name}.mp4", [(getattr(colours, name), 12), (colours.grey, 4)])
    index = VideoIndex.create(tmp_path / "i", make_encoder())
    index.add([tmp_path / "v"], model=make_encoder())
    return index


def test_generations_come_whole_and_a_killed_one_not_at_all(
    bucket, own, tmp_path, clip, colours, make_encoder, monkeypatch
) -> None:
    uri, model = f"{bucket}/{os.urandom(4).hex()}", make_encoder()
    assert publish(own, uri, group_size=3).num_groups == 2
    store, first = StoreSearcher(uri, model), Searcher(own, model, backend="exact").search("blue")
    assert store.search("blue") == first
    assert store.search("red", where="path like '%green%'") == (
        Searcher(own, model, backend="exact").search("red", where="path like '%green%'")
    )
    clip(tmp_path / "blue.mp4", [(colours.blue, 8)])
    own.add([tmp_path / "blue.mp4"], model=model)
    own.remove([str(tmp_path / "v" / "green.mp4")])

    def die(name: str) -> None:
        if name == "store-before-manifest":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("vlm.retrieval.store.publishing.crash_point", die)
        publish(own, uri)
    assert StoreSearcher(uri, model).search("blue") == first
    assert publish(own, uri).generation == 2
    assert store.search("blue") == first  # it holds the generation that it opened
    store.refresh()
    now = Searcher(own, model, backend="exact").search("blue")
    assert store.search("blue") == now != first


def test_a_service_out_of_reach_is_said_to_be(bucket, own, make_encoder, monkeypatch, capsys) -> None:
    uri = f"{bucket}/{os.urandom(4).hex()}"
    publish(own, uri)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(StoreError, match="s3://videos"):
            StoreSearcher(uri, make_encoder())
        assert main(["search", uri, "red", "--backend", "lance"]) == StoreError.exit_code
    printed = capsys.readouterr()
    assert uri in printed.err and "Traceback" not in printed.err
