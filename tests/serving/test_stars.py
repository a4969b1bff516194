"""Starred hits: rows that `vlm index check` reads, whoever else writes the file, and no formulas in it."""

from __future__ import annotations

import csv
import threading

import pytest

from vlm import Client
from vlm.errors import BusyError, InvalidInput
from vlm.retrieval.quality.known_items import (
    KnownItem,
    format_known_items,
    parse_known_items,
    read_known_items,
)
from vlm.retrieval.quality.starring import KnownItemFile


@pytest.fixture
def file(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder / "known.csv"


@pytest.fixture
def starring(index, serving, file, tmp_path):
    with serving(index, tmp_path / "cache", queries_file=file) as site:
        yield site


def body(video_id: str, text: str = "a red thing", start_s: float = 0.0, end_s: float = 5.5) -> dict:
    return {"text": text, "video_id": video_id, "start_s": start_s, "end_s": end_s}


def test_a_starred_hit_is_a_row_that_the_check_finds(starring, file, index, capsys) -> None:
    from vlm.cli import main

    client = Client(starring.address)
    assert client.starred() == [] and not file.exists()
    hits = client.search("a red thing")
    row = client.star(" a red thing ", hits[0])
    assert client.star("a red thing", hits[0]) == row
    client.star("something else", hits[1])
    expected = [("a red thing", hits[0]), ("something else", hits[1])]
    assert read_known_items(file) == [
        KnownItem(query=text, video=hit.path, start_s=hit.start_s, end_s=hit.end_s) for text, hit in expected
    ]
    assert [(r["text"], r["video_id"]) for r in client.starred()] == [(t, h.video_id) for t, h in expected]
    assert main(["index", "check", str(index), "--queries", str(file)]) == 0
    assert "2 known items" in capsys.readouterr().out
    command = starring.get("/api/queries").json["command"]
    assert command == f"vlm index check {index} --queries {file}"
    assert client.unstar(row["key"]) == row
    with pytest.raises(InvalidInput, match="no such query"):
        client.unstar(row["key"])
    assert [item.query for item in read_known_items(file)] == ["something else"]
    client.unstar(client.starred()[0]["key"])
    assert client.starred() == [] and file.read_text().split() == ["query,video,start_s,end_s"]


def test_nothing_is_kept_unless_asked_for(site, ids, index) -> None:
    before = {path for path in index.parent.rglob("*") if path.suffix == ".csv"}
    assert site.get("/api/info").json["keeps_queries"] is False
    for reply in (
        site.get("/api/queries"),
        site.post("/api/queries", body(ids["red"])),
        site.ask("DELETE", "/api/queries/0"),
    ):
        assert reply.status == 404 and reply.json["error"]["code"] == "no_queries_file"
        assert "--queries" in reply.json["error"]["message"]
    assert {path for path in index.parent.rglob("*") if path.suffix == ".csv"} == before == set()
    calls = site.get("/api/openapi.json").json["paths"]["/api/queries"]
    assert "without --queries" in calls["post"]["description"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"video_id": "../../etc/passwd"}, 404),
        ({"video_id": "/etc/passwd"}, 404),
        ({"path": "/etc/passwd"}, 400),
        ({"video": "x"}, 400),
        ({"text": "  "}, 400),
        ({"text": "x" * 2001}, 400),
        ({"text": "a\0b"}, 400),
        ({"text": "\ud800"}, 400),
        ({"start_s": 5.5}, 400),
        ({"start_s": -1}, 400),
        ({"end_s": 1e6}, 400),
        ({"end_s": None}, 400),
    ],
)
def test_wrong_wishes_are_refused(starring, ids, file, change, status) -> None:
    assert starring.post("/api/queries", body(ids["red"]) | change).status == status
    assert not file.exists()


@pytest.mark.parametrize(
    "text",
    [
        '=HYPERLINK("http://x.test";"a")', "+1", "-1+2", "@SUM(A1)", "\uff1dcmd", "'=1", "''=1", "'plain",
        'a "quoted", text', "two\nlines", "two\rlines", "two\r\nlines", "\u0645\u0631 \U0001f415",
        "x\u2028y", "\ufeffx", "a;b\tc",
    ],
)  # fmt: skip
def test_every_text_comes_back_as_it_was_and_none_is_a_formula(starring, ids, file, text) -> None:
    Client(starring.address)._post("/api/queries", body(ids["red"], text))
    Client(starring.address)._post("/api/queries", body(ids["red"], "another"))
    assert [item.query for item in read_known_items(file)] == [text, "another"]
    with file.open(encoding="utf-8", newline="") as stream:
        cells = [cell for row in list(csv.reader(stream))[1:] for cell in row]
    assert not [cell for cell in cells if cell[:1] in set("=+-@\t\r\uff1d\uff0b\uff0d\uff20")]


def test_what_people_write_stays(starring, ids, file, films) -> None:
    # the same moment as below under another name, a row of no index, and a spreadsheet's mark
    own = "\ufeffvideo,query,end_s,start_s\n{},a red thing,5.50,0\ngone.mp4,elsewhere,,\n".format(ids["red"])
    file.write_text(own, encoding="utf-8")
    written = file.read_bytes()
    starring.post("/api/queries", body(ids["red"]))
    assert file.read_bytes() == written
    reply = starring.post("/api/queries", body(ids["blue"], "blue"))
    assert reply.json["video"] == str(films / "blue.mp4")
    assert [(item.query, item.video, item.end_s) for item in read_known_items(file)] == [
        ("a red thing", ids["red"], 5.5),
        ("elsewhere", "gone.mp4", None),
        ("blue", str(films / "blue.mp4"), 5.5),
    ]  # fmt: skip
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    rows = starring.get("/api/queries").json["queries"]
    assert [row["video_id"] for row in rows] == [ids["red"], None, ids["blue"]]


@pytest.mark.parametrize(
    "content",
    [b"query,video\nx\n", b"my notes\n", b"\xff\xfe", b"query,video,mood\n", b"query,video\na,b\na,b\n"],
)
def test_a_file_that_is_something_else_is_never_overwritten(starring, ids, file, content) -> None:
    file.write_bytes(content)
    for reply in (
        starring.get("/api/queries"),
        starring.post("/api/queries", body(ids["red"])),
        starring.ask("DELETE", "/api/queries/0"),
    ):
        assert (reply.status, reply.json["error"]["code"]) == (409, "queries_file")
        assert "known.csv" in reply.json["error"]["message"]
        assert str(file.parent) not in reply.json["error"]["message"]
    assert file.read_bytes() == content and [path.name for path in file.parent.iterdir()] == ["known.csv"]


def test_many_at_once_lose_nothing(starring, ids, file) -> None:
    def star(worker: int) -> None:
        for number in range(10):
            reply = starring.post(
                "/api/queries", body(ids["red"], f"text {number if worker % 2 else worker * 100}")
            )
            assert reply.status == 200

    threads = [threading.Thread(target=star, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item.query for item in read_known_items(file)) == sorted(
        {f"text {n}" for n in (*range(10), 0, 200, 400)}
    )


def test_an_edit_in_between_is_respected(file, index, monkeypatch) -> None:
    from vlm.retrieval import VideoIndex

    videos = VideoIndex.open(index).snapshot.videos
    known = KnownItemFile(file, 2)
    known.add("first", videos[0], 0.0, 1.0, videos)
    reads = iter([file.read_bytes(), b"query,video\nedited,by-hand.mp4\n"])
    monkeypatch.setattr(known, "_content", lambda: next(reads))
    with pytest.raises(BusyError, match="try again"):
        known.add("second", videos[0], 0.0, 1.0, videos)
    monkeypatch.undo()
    assert [item.query for item in known.read()] == ["first"]
    known.add("second", videos[0], 0.0, 1.0, videos)
    with pytest.raises(InvalidInput, match="holds 2 queries, the most"):
        known.add("third", videos[0], 0.0, 1.0, videos)


def test_names_that_are_no_plain_text_become_identifiers(file, index) -> None:
    import dataclasses

    from vlm.retrieval import VideoIndex

    videos = VideoIndex.open(index).snapshot.videos
    for number, path in enumerate((b"/films/\xff.mp4", b"/films/a\nb.mp4", b"/films/a.mp4 ")):
        odd = dataclasses.replace(videos[0], path=path)
        item = KnownItemFile(file, 9).add(f"text {number}", odd, 0.0, 1.0, [odd])
        assert item.video == odd.video_id
    assert len(read_known_items(file)) == 3


def test_times_are_kept_to_the_last_bit(tmp_path) -> None:
    items = [KnownItem(query="q", video="v", start_s=0.1 + 0.2, end_s=1e3 / 3)]
    assert parse_known_items(format_known_items(items), tmp_path) == items


def test_the_server_does_not_start_over_a_file_of_something_else(index, file, capsys) -> None:
    from vlm.cli import main

    file.write_text("my notes\n")
    for name, message in ((file, "expected the columns"), (file / "x.csv", "no such folder")):
        assert main(["serve", str(index), "--queries", str(name), "--port", "0"]) == 4
        assert message in capsys.readouterr().err
