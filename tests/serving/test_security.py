"""Who may ask what: hosts, origins, tokens, cookies, identifiers that are paths, links that were swapped."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from vlm.errors import InvalidInput
from vlm.serving.settings import ServeSettings

OPEN = {"/", "/healthz", "/readyz", "/api/session", "/static/{name}"}


@pytest.fixture(scope="module")
def locked(index, serving, token, tmp_path_factory):
    with serving(
        index, tmp_path_factory.mktemp("cache"), token=token, allowed_hosts=("videos.test",)
    ) as running:
        yield running


def every_route(ids):
    from vlm.serving.app import ROUTES

    names = {"{video_id}": ids["blue"], "{name}": "app.js", "{job_id}": "0"}
    for route in ROUTES:
        path = route.path
        for name, value in names.items():
            path = path.replace(name, value)
        for method in sorted(route.methods - {"HEAD"}):
            yield route.path, method, path


def test_every_route_wants_the_token(locked, ids, token) -> None:
    seen = 0
    for route, method, path in every_route(ids):
        none = locked.ask(method, path)
        wrong = locked.ask(method, path, headers={"Authorization": f"Bearer {token[:-1]}X"})
        good = locked.ask(method, path, headers={"Authorization": f"Bearer {token}"})
        if route in OPEN:
            assert none.status < 500
            continue
        seen += 1
        assert (none.status, wrong.status) == (401, 401), (method, path)
        assert none.headers["www-authenticate"] == "Bearer"
        assert good.status not in (401, 403) and good.status < 500, (method, path, good.body)
    assert seen > 12


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic YTpi", "bearer  x", "Bearer \xe9\xe9"])
def test_odd_credentials_are_refused(locked, value) -> None:
    assert locked.get("/api/info", Authorization=value).status == 401


def test_a_session_stands_for_the_token(locked, token) -> None:
    assert locked.get("/api/session").json == {"is_required": True, "is_open": False}
    assert locked.ask("POST", "/api/session", headers={"Authorization": "Bearer nothing"}).status == 401
    begun = locked.ask("POST", "/api/session", headers={"Authorization": f"Bearer {token}"})
    cookie = begun.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and token not in cookie
    pair = cookie.partition(";")[0]
    assert locked.get("/api/info", Cookie=pair).status == 200
    # cookies of other programs on this host, which no standard allows
    for others in ('prefs={"x":1}; {}; last', "a b=c; {}", "; =;{}", "x=[1,2]; y=\xe9; {}"):
        assert locked.get("/api/info", Cookie=others.replace("{}", pair)).status == 200, others
    assert locked.get("/api/info", Cookie=pair[:-1] + "!").status == 401
    assert locked.ask("DELETE", "/api/session", headers={"Cookie": pair}).status == 200
    assert locked.get("/api/info", Cookie=pair).status == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:80", 200),
        ("[::1]:8000", 200),
        ("videos.test", 200),
        ("VIDEOS.test:1", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
        ("localhost:x", 403),
        ("evil.example:8000", 403),
        ("localhost@evil.example", 403),
    ],
)
def test_only_names_of_this_server_are_answered(locked, token, host, status) -> None:
    assert locked.get("/api/info", Host=host, Authorization=f"Bearer {token}").status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "{own}"}, 200),
        ({"Origin": "{own}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_other_pages_are_refused(site, headers, status) -> None:
    headers = {name: value.replace("{own}", site.address) for name, value in headers.items()}
    reply = site.ask("POST", "/api/search", {"text": "red"}, headers)
    assert reply.status == status
    assert "access-control-allow-origin" not in reply.headers
    assert site.ask("GET", "/api/info", headers=headers).status == status


def test_a_link_from_anywhere_opens_the_page_but_nothing_else(site) -> None:
    assert site.get("/", Sec_Fetch_Site="cross-site").status == 200
    assert site.get("/static/app.js", Sec_Fetch_Site="cross-site").status == 403


def test_forms_cannot_post(site) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert site.post("/api/search", b'{"text": "red"}', Content_Type=kind).status == 415


def test_answers_carry_safe_headers(site, ids) -> None:
    page = site.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for path in ("/", "/api/info", f"/api/videos/{ids['blue']}/content", "/nothing"):
        headers = site.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers
    assert "<script>" not in page.body.decode() and "style=" not in page.body.decode()


HOSTILE = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "....//etc/passwd",
    "..%5c..%5cetc",
    "%00",
    "a%00b",
    "%ff%fe",
    "%c0%ae%c0%ae",
    "'%20or%20'1'='1",
    "*",
    "~root",
    "x" * 5000,
    "file:///etc/passwd",
    "http://127.0.0.1/",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "shape", ["/api/videos/{}", "/api/videos/{}/content", "/api/clips/{}", "/static/{}", "/{}"]
)
def test_no_identifier_is_a_path(site, shape, name) -> None:
    reply = site.get(shape.format(name))
    assert reply.status in (400, 404), reply.body
    assert b"root:" not in reply.body


def test_no_path_of_a_client_reaches_the_disk(site) -> None:
    for body in ({"folder": "/etc"}, {"folder": "../"}, {"folder": "x", "path": "/etc"}, {"paths": ["/etc"]}):
        assert site.post("/api/ingest", body).status in (400, 404)
    for name in HOSTILE[:8]:
        assert site.post("/api/similar", {"video_id": name, "start_s": 0}).status == 404
        assert site.post("/api/ask", {"question": "red", "video_id": name}).status == 404


def test_a_file_that_is_not_what_was_indexed_is_not_served(
    serving, model, model_source, write_clip, tmp_path
) -> None:
    from vlm.retrieval import VideoIndex

    films, outside = tmp_path / "films", tmp_path / "outside.mp4"
    paths = [
        write_clip(films / name, [("red", 1)])
        for name in ("link.mp4", "gone.mp4", "grown.mp4", "fifo.mp4", "deep/x.mp4", "kept.mp4")
    ]
    folder = tmp_path / "index"
    index = VideoIndex.create(folder, model, source=model_source)
    index.add([films], model=model)
    by_name = {Path(os.fsdecode(v.path)).name: v.video_id for v in index.snapshot.videos}
    with serving(folder, tmp_path / "cache") as site:
        addresses = {name: f"/api/videos/{video_id}/content" for name, video_id in by_name.items()}
        shutil.copy(paths[0], outside)
        paths[0].unlink()
        paths[0].symlink_to(outside)  # the same bytes, but from outside
        paths[1].unlink()
        paths[2].write_bytes(paths[2].read_bytes() + b"!")
        paths[3].unlink()
        os.mkfifo(paths[3])
        shutil.move(films / "deep", tmp_path / "moved")
        (films / "deep").symlink_to(tmp_path / "moved")
        statuses = {name: site.get(address).status for name, address in addresses.items()}
        assert statuses == {
            "link.mp4": 404,
            "gone.mp4": 404,
            "grown.mp4": 409,
            "fifo.mp4": 404,
            "x.mp4": 404,
            "kept.mp4": 200,
        }


def test_the_network_is_served_only_with_a_token(tmp_path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(InvalidInput, match="--token-file"):
            ServeSettings(host=host, cache_folder=tmp_path)
        ServeSettings(host=host, cache_folder=tmp_path, allow_no_token=True)
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        ServeSettings(host=host, cache_folder=tmp_path)
    with pytest.raises(InvalidInput, match="at least 16"):
        ServeSettings(cache_folder=tmp_path, token="short")
    assert "a-secret-token-x" not in repr(ServeSettings(cache_folder=tmp_path, token="a-secret-token-x"))


def test_broken_http_does_no_harm(site) -> None:
    for content in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"A" * 100_000):
        with socket.create_connection((site.host, site.port), timeout=10) as connection:
            connection.sendall(content)
            answer = connection.recv(100)
            assert answer == b"" or b" 4" in answer[:14], answer
    assert site.get("/healthz").status == 200
