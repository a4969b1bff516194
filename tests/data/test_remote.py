"""Shards behind a URL: the same samples as from the folder, verified, whatever the network does."""

from __future__ import annotations

import pickle
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from vlm.cli import main
from vlm.data.loader import Loader, LoaderConfig
from vlm.data.shards import ShardReader, ShardWriter, remote
from vlm.data.shards.remote import CacheConfig, RemoteFolder, shown
from vlm.data.shards.verification import verify_shards
from vlm.data.sources import ShardSource
from vlm.errors import DataError, InvalidInput, MissingExtra
from vlm.types import Preprocessing

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback, counts requests, and misbehaves on request."""

    requests: Counter[str]
    faults: dict[str, list[str]]  # file name → what happens to its next requests


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        fault = self.server.faults.get(name, [])
        if not fault:
            super().do_GET()
            return
        data = (Path(self.directory) / name).read_bytes()
        kind = fault.pop(0)
        if kind == "error":
            self.send_error(503)
            return
        body = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "short": data[:-7], "long": data + bytes(9)}[kind]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path / "shards", {"input": "test"}, 20_000)
    rng = np.random.default_rng(1)
    for number in range(16):
        writer.add(f"k{number:02d}", {"mp4": rng.bytes(4000), "txt": f"caption {number}".encode()})
    writer.finish()
    return tmp_path / "shards"


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    made.requests, made.faults = Counter(), {}
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(autouse=True)
def no_waiting_and_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def everything(reader: ShardReader) -> dict[str, dict[str, bytes]]:
    return {
        raw.key: raw.members
        for shard, size in enumerate(reader.shard_sizes)
        for raw in (reader.read(shard, number) for number in range(size))
    }


def held(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/*.tar"))


def test_over_http_each_shard_is_fetched_once(tmp_path: Path, shards: Path, server: Server) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    reader = ShardReader(url_of(server), cache)
    assert everything(reader) == everything(ShardReader(shards))
    again = pickle.loads(pickle.dumps(reader))
    assert everything(again) == everything(ShardReader(shards))
    tars = {record.file for record in reader.manifest.shards}
    assert {name: server.requests[name] for name in tars} == dict.fromkeys(tars, 1)
    assert not list((tmp_path / "cache").glob("*/.*.tmp"))


def test_from_memory_and_into_training(tmp_path: Path, shards: Path, encode, numbered) -> None:
    from vlm.data.annotations import Annotation
    from vlm.data.packing import pack

    for number in range(4):
        encode(tmp_path / f"c{number}.mp4", numbered(5), preset="ultrafast")
    entries = [Annotation(video=f"c{number}.mp4", captions=("x",)) for number in range(4)]
    pack(entries, tmp_path, tmp_path / "packed", max_shard_bytes=4000)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "packed"), "/bucket/packed", recursive=True)
    source = ShardSource("memory://bucket/packed", cache=CacheConfig(folder=tmp_path / "cache"))
    local = ShardSource(tmp_path / "packed")
    assert source.fingerprint == local.fingerprint
    p = Preprocessing(num_frames=2, image_size=8)
    batches = [list(Loader(s, p, LoaderConfig(workers=2)).batches(num_epochs=1)) for s in (source, local)]
    assert [b.keys for b in batches[0]] == [b.keys for b in batches[1]]
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("faults", [["error"], ["flip", "short"], ["long", "error", "flip"]])
def test_faults_of_the_network_are_tried_again(tmp_path: Path, server: Server, faults: list[str]) -> None:
    server.faults = {"shard-000001.tar": list(faults), "shard-000000.index.jsonl": list(faults)}
    reader = ShardReader(url_of(server), CacheConfig(folder=tmp_path / "cache"))
    assert len(everything(reader)) == 16
    assert server.requests["shard-000001.tar"] == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "reason"), [("error", "remote_unreachable"), ("flip", "checksum"), ("long", "checksum")]
)
def test_what_never_comes_right_is_a_broken_sample(
    tmp_path: Path, shards: Path, server: Server, fault: str, reason: str
) -> None:
    """Nothing wrong is ever kept, and the others are read."""
    server.faults = {"shard-000001.tar": [fault] * 1000}
    reader = ShardReader(url_of(server), CacheConfig(folder=tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        reader.read(1, 0)
    assert caught.value.reason == reason
    assert "shard-000001.tar" not in held(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/.*.tmp"))
    assert reader.read(0, 0) == ShardReader(shards).read(0, 0)
    findings = verify_shards(url_of(server))
    assert [(finding.file, finding.reason) for finding in findings] == [("shard-000001.tar", reason)]


def test_missing_things(tmp_path: Path, shards: Path, server: Server) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    with pytest.raises(DataError, match="no manifest") as caught:
        ShardReader(url_of(server) + "/other", cache)
    assert caught.value.reason == "no_manifest"
    reader = ShardReader(url_of(server), cache)
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError) as caught:
        reader.read(2, 0)
    assert caught.value.reason == "shard_missing"
    server.faults = {"manifest.json": ["error"] * 100}
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        ShardReader(url_of(server), cache)
    assert caught.value.reason == "remote_unreachable"


def test_a_copy_that_rotted_is_fetched_once_more(tmp_path: Path, shards: Path, server: Server) -> None:
    reader = ShardReader(url_of(server), CacheConfig(folder=tmp_path / "cache"))
    everything(reader)
    (copy,) = (tmp_path / "cache").glob("*/shard-000000.tar")
    data = bytearray(copy.read_bytes())
    data[reader.entry(0, 0).members[0].offset] ^= 1
    copy.write_bytes(bytes(data))
    assert reader.read(0, 0) == ShardReader(shards).read(0, 0)
    copy.write_bytes(bytes(data[:100]))
    assert reader.read(0, 0) == ShardReader(shards).read(0, 0)
    assert server.requests["shard-000000.tar"] == 3


def test_the_cache_stays_within_its_bound(tmp_path: Path, shards: Path, server: Server) -> None:
    sizes = [record.num_bytes for record in ShardReader(shards).manifest.shards]
    assert len(sizes) >= 4
    cache = CacheConfig(folder=tmp_path / "cache", max_bytes=2 * max(sizes))
    reader = ShardReader(url_of(server), cache)
    truth = ShardReader(shards)
    for shard in (0, 1, 0, 2, 0, 3, 0):
        assert reader.read(shard, 0) == truth.read(shard, 0)
        stored = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar"))
        assert stored <= cache.max_bytes
    assert held(tmp_path / "cache") == ["shard-000000.tar", "shard-000003.tar"]
    assert server.requests["shard-000000.tar"] == 1, "what is in use stays"
    small = ShardReader(url_of(server), CacheConfig(folder=tmp_path / "small", max_bytes=min(sizes) // 2))
    with pytest.raises(DataError, match="cache_gb") as caught:
        small.read(0, 0)
    assert caught.value.reason == "cache_too_small"


def test_many_threads_and_readers_with_one_small_cache(tmp_path: Path, shards: Path, server: Server) -> None:
    sizes = [record.num_bytes for record in ShardReader(shards).manifest.shards]
    cache = CacheConfig(folder=tmp_path / "cache", max_bytes=2 * max(sizes))
    readers = [ShardReader(url_of(server), cache) for _ in range(3)]
    truth = ShardReader(shards)
    places = [(shard, number) for shard, size in enumerate(truth.shard_sizes) for number in range(size)] * 4

    def check(task: tuple[int, tuple[int, int]]) -> bool:
        return readers[task[0] % 3].read(*task[1]) == truth.read(*task[1])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, enumerate(places)))


def test_a_copy_that_leaves_before_it_is_opened_is_fetched_again(
    tmp_path: Path, shards: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(url_of(server), CacheConfig(folder=tmp_path / "cache"))
    local, left = RemoteFolder.local, []

    def leave_once(self: RemoteFolder, name: str, sha256: str, size: int | None = None) -> Path:
        path = local(self, name, sha256, size)
        if name.endswith(".tar") and not left:
            left.append(name)
            path.unlink()
        return path

    monkeypatch.setattr(RemoteFolder, "local", leave_once)
    assert reader.read(0, 0) == ShardReader(shards).read(0, 0) and left


def test_the_program(tmp_path: Path, server: Server, capsys) -> None:
    assert main(["data", "verify", url_of(server)]) == 0
    assert "16 samples" in capsys.readouterr().out
    assert held(tmp_path / "home" / "shards")
    shutil.rmtree(tmp_path / "home")
    assert main(["data", "describe", url_of(server), "--json"]) == 0


@pytest.mark.parametrize(
    "url",
    ["file:///etc", "pipe://touch x", "zip::http://127.0.0.1/x", "http://127.0.0.1/x?a=b", "ftp://x/y",
     "simplecache::memory://x", "github://a:b@c/d"],
)  # fmt: skip
def test_urls_that_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput, match="expected a folder at http://"):
        ShardReader(url, CacheConfig(folder=tmp_path))


def test_missing_packages_name_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"s3fs.*pip install 'videomamba-vlm\[s3\]'"):
        ShardReader("s3://bucket/shards", CacheConfig(folder=tmp_path))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtra, match=r"pip install 'videomamba-vlm\[remote\]'"):
        ShardReader("https://example.org/shards", CacheConfig(folder=tmp_path))


def test_names_and_passwords_are_not_shown() -> None:
    assert shown("https://me:secret@example.org/a@b") == "https://example.org/a@b"
    with pytest.raises(ValueError, match="max_bytes"):
        CacheConfig(max_bytes=0)
