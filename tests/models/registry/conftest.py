"""A model hub on the loopback interface, which can break in every way that the real one does."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import save

import vlm.models.registry.download as download
import vlm.models.registry.entries as entries


@dataclass
class Hub:
    """What the server does; tests change it between requests."""

    content: bytes
    url: str = ""
    honours_range: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes to send before cutting, one entry a request
    status: list[int] = field(default_factory=list)  # statuses to answer with first
    stated_sha256: str | None = None  # sent on a redirect, as the hub does
    tag: str = '"v1"'
    ranges: list[str | None] = field(default_factory=list)  # seen
    sent: int = 0

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        if self.hub.stated_sha256 is not None and not self.path.startswith("/cdn"):
            return self._redirect()
        self.hub.ranges.append(self.headers.get("Range"))
        if self.hub.status:
            return self._refuse(self.hub.status.pop(0))
        start, status = self._range()
        if start >= len(self.hub.content) and start:
            return self._refuse(416)
        body = self.hub.content[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.hub.tag)
        if status == 206:
            last, total = len(self.hub.content) - 1, len(self.hub.content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{total}")
        self.end_headers()
        cut = self.hub.cut_after.pop(0) if self.hub.cut_after else len(body)
        # before it is sent: who has it all may look at once
        self.hub.sent += len(body[:cut])
        self.wfile.write(body[:cut])
        self.close_connection = True
        return None

    def _range(self) -> tuple[int, int]:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.hub.honours_range and self.headers.get("If-Range") == self.hub.tag:
            return int(asked[1]), 206
        return 0, 200

    def _redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"/cdn{self.path}")
        self.send_header("X-Linked-ETag", f'"{self.hub.stated_sha256}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


def _weights(seed: int) -> bytes:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return save({"weight": torch.rand(64, 2048, generator=generator)})


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub with one model `tiny`, an empty store, and a network that is allowed."""
    state = Hub(_weights(1))
    handler = type("Handler", (_Handler,), {"hub": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("VLM_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLM_MODELS_URL", state.url)
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "_SECONDS_BETWEEN_TRIES", 0.0)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def publish(monkeypatch, tmp_path, hub):
    """Put a registry in place whose model `tiny` is what the hub serves, with the given changes."""

    def write(**changes: object) -> Path:
        known = {"sha256": hub.sha256, "size_bytes": len(hub.content), "size_mb": len(hub.content) / 1e6}
        file = {"role": "weights", "repo": "someone/tiny", "revision": "abc", "file": "tiny.safetensors"}
        described = {name: value for name, value in {**file, **known, **changes}.items() if value is not None}
        lines = "".join(f"          {name}: {value!r}\n" for name, value in described.items())
        path = tmp_path / "models.yaml"
        path.write_text(
            "models:\n  tiny:\n    summary: a tiny model\n    kind: official\n    licence: Apache-2.0\n"
            f"    domain: open\n    capabilities: [search]\n    files:\n        -\n{lines}",
            encoding="utf-8",
        )
        monkeypatch.setattr(entries, "asset", lambda _path: path)
        return path

    write()
    return write
