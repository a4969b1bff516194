"""Searching over HTTP: the same hits as everywhere else, pages that fit together, hostile bodies refused."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm import Client
from vlm.cli import main
from vlm.errors import BusyError, CapabilityError, DataError, InvalidInput
from vlm.retrieval import Mix, Moment, Part, Searcher, VideoIndex
from vlm.serving.schemas import hit_values
from vlm.types import Duplicate, Hit


@pytest.fixture(scope="module")
def searcher(index, model) -> Searcher:
    return Searcher(VideoIndex.open(index), model)


@pytest.fixture(scope="module")
def client(site) -> Client:
    return Client(site.address)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((48, 64, 3), (200, 30, 30), np.uint8)).save(path)
    return path


def cli_hits(capsys, *arguments: str) -> list[Hit]:
    assert main(["search", *arguments, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    for hit in hits:
        del hit["model_domain"]
    return [Hit.from_json(hit) for hit in hits]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"rerank": 5},
        {"where": "duration_s > 5 and height < 90"},
        {"top_k": 2, "rerank": 4},
        {"words": True},
        {"words": True, "rerank": 3, "where": "duration_s > 2"},
        {"min_strength": "weak"},
        {"aggregate": "mean"},
        {"min_strength": "strong", "rerank": 6},
    ],
)
def test_python_http_and_command_line_agree(searcher, client, index, capsys, options) -> None:
    expected = searcher.search("a red thing", **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not True]
    flags += [f"--{name}" for name, value in options.items() if value is True]
    assert client.search("a red thing", **options) == expected
    assert cli_hits(capsys, str(index), "a red thing", *flags) == expected
    assert len(expected) > 1 or "min_strength" in options
    assert all(hit.strength is not None for hit in expected)


def test_sums_and_rejections_are_the_same_everywhere(
    searcher, client, index, ids, picture, films, capsys
) -> None:
    shot = films / "old.avi"
    mix = Mix(
        (Part("a red thing"), Part(picture, 0.5), Part(shot, 2.0), Part(Moment(ids["blue"], 0.0), -0.5))
    )
    unlike = [Moment(ids["grey"], 0.0)]
    expected = searcher.search(mix, unlike=unlike)
    assert len(expected) == 5
    assert client.search(mix, unlike=unlike) == expected
    flags = ["--plus", f"0.5*image:{picture}", "--plus", f"2*video:{shot}"]
    flags += ["--minus", f"0.5*like:{ids['blue']}@0", "--unlike", f"{ids['grey']}@0"]
    assert cli_hits(capsys, str(index), "a red thing", *flags) == expected
    moment = Moment(ids["red"], 8.0)
    assert client.search(moment, offset=1, top_k=2) == searcher.search(moment, top_k=3)[1:]
    with pytest.raises(InvalidInput, match="takes texts, files and moments"):
        client.search(Mix((Part(np.zeros(3)),)))


def test_an_index_without_a_model_is_served(films, serving, tmp_path, picture) -> None:
    from vlm.retrieval.words.no_model import NoModel

    index = VideoIndex.create(tmp_path / "i", NoModel())
    index.add([films], model=NoModel())
    local = Searcher(index, NoModel())
    with serving(tmp_path / "i", tmp_path / "cache", model=NoModel()) as site:
        client = Client(site.address)
        hits = client.search("green")
        assert hits == local.search("green")
        assert hits[0].path.endswith("red then green.mp4") and hits[0].score_kind == "words"
        assert client.search("zebra") == []
        assert client.search(picture) == local.search(picture)
        others = local.search(
            Moment(hits[0].video_id, hits[0].start_s), where=f"video_id != '{hits[0].video_id}'"
        )
        assert client.similar(hits[0]) == others and others


def test_uploads_find_what_files_find(searcher, client, films, index, picture, capsys) -> None:
    for path in (picture, films / "old.avi"):
        expected = searcher.search(path, top_k=4)
        assert client.search(path, top_k=4) == expected
        flag = "--image" if path == picture else "--video"
        assert cli_hits(capsys, str(index), flag, str(path), "--top-k", "4") == expected
        where = "duration_s < 7"
        assert client.search(path, where=where) == searcher.search(path, where=where)


def test_pages_join_to_the_whole(site) -> None:
    whole = site.post("/api/search", {"text": "blue", "top_k": 6, "rerank": 3}).json
    assert len(whole["hits"]) == 6 and whole["next_offset"] is None
    pages, offset = [], 0
    while offset is not None:
        page = site.post("/api/search", {"text": "blue", "top_k": 2, "offset": offset, "rerank": 3}).json
        pages += page["hits"]
        offset = page["next_offset"]
    assert pages == whole["hits"]
    again = {"query_id": whole["query_id"], "offset": 4, "top_k": 2, "rerank": 3}
    assert site.post("/api/search", again).json["hits"] == whole["hits"][4:]


def test_an_upload_has_further_pages(site, picture, client) -> None:
    first = site.post("/api/search/image?top_k=2", picture.read_bytes(), Content_Type="image/png").json
    assert first["next_offset"] == 2
    rest = site.post("/api/search", {"query_id": first["query_id"], "offset": 2, "top_k": 10}).json
    assert [Hit.from_json(hit) for hit in first["hits"] + rest["hits"]] == client.search(picture, top_k=12)
    gone = site.post("/api/search", {"query_id": "0" * 32})
    assert (gone.status, gone.json["error"]["code"]) == (410, "query_gone")
    refused = site.post("/api/search", {"query_id": first["query_id"], "rerank": 3})
    assert (refused.status, refused.json["error"]["code"]) == (422, "capability")


def test_similar_moments_are_those_of_the_stored_vector(site, searcher, client, ids) -> None:
    vector = searcher.encode_segment(ids["red"], 8.0)
    expected = [hit for hit in searcher.search(vector, top_k=10) if hit.video_id != ids["red"]]
    found = site.post("/api/similar", {"video_id": ids["red"], "start_s": 8.0}).json["hits"]
    assert [(h["video_id"], h["start_s"], h["score"]) for h in found] == [
        (h.video_id, h.start_s, h.score) for h in expected
    ]
    # the segment itself is the nearest to its own vector, when it is of unit length or the index says so
    hit = client.search("red", top_k=1)[0]
    filtered = client.similar(hit, where="duration_s < 7 or duration_s > 15")
    assert filtered and all(h.video_id != hit.video_id for h in filtered)


def test_a_filter_cannot_reach_around_the_exclusion(site, ids) -> None:
    body = {"video_id": ids["red"], "start_s": 0, "where": "duration_s > 0) or (duration_s > 0"}
    assert site.post("/api/similar", body).status == 400


def test_no_page_of_similar_moments_shows_the_video_itself(site, ids) -> None:
    wanted = {"video_id": ids["red"], "start_s": 8.0}
    whole = site.post("/api/similar", wanted).json["hits"]
    first = site.post("/api/similar", {**wanted, "top_k": 2}).json
    rest = {"query_id": first["query_id"], "offset": first["next_offset"]}
    assert first["hits"] + site.post("/api/search", rest).json["hits"] == whole and len(whole) > 3
    where = "duration_s > 4 or duration_s < 3"
    filtered = site.post("/api/search", {"query_id": first["query_id"], "where": where}).json["hits"]
    assert filtered == site.post("/api/similar", {**wanted, "where": where}).json["hits"]
    assert filtered and ids["red"] not in {hit["video_id"] for hit in filtered}


def test_asking_chooses_and_shows_where(client, site, index, model) -> None:
    from vlm.answering import choose

    expected = choose(Searcher(VideoIndex.open(index), model), "which colour", ["red", "blue"])
    answers = client.ask("which colour", ["red", "blue"])
    assert [(a.text, a.evidence) for a in answers] == [(a.text, a.evidence) for a in expected.answers]
    assert [a.score for a in answers] == pytest.approx([a.score for a in expected.answers], abs=1e-5)
    (only,) = client.ask("a red thing")
    assert only.text == "" and only.evidence[0].video_id
    reply = site.post("/api/ask", {"question": "which zebra", "choices": ["red", "blue"]}).json
    assert "zebra" in reply["unknown_words"]


def test_unknown_words_are_told(site) -> None:
    assert site.post("/api/search", {"text": "a red zebra"}).json["unknown_words"] == ["zebra"]


HOSTILE_BODIES = [
    {},
    {"text": ""},
    {"text": "   "},
    {"text": 3},
    {"text": None},
    {"text": "red", "query_id": "x"},
    {"text": "red", "top_k": 0},
    {"text": "red", "top_k": 1001},
    {"text": "red", "top_k": 10**9},
    {"text": "red", "top_k": "5"},
    {"text": "red", "top_k": True},
    {"text": "red", "top_k": 1.0},
    {"text": "red", "offset": -1},
    {"text": "red", "offset": 1000},
    {"text": "red", "rerank": -1},
    {"text": "red", "topk": 3},
    {"text": "x" * 2001},
    {"text": "red\0"},
    {"text": "\ud800"},
    {"text": "red", "where": "duration_s >"},
    {"text": "red", "where": "1; DROP TABLE videos"},
    {"text": "red", "where": "(" * 1400},
    {"text": "red", "where": "x" * 1501},
    {"text": ["red"]},
    {"text": {"a": 1}},
    {"query_id": 4},
    {"text": "red", "where": 5},
    {"text": "red", "min_strength": "good"},
    {"text": "red", "aggregate": "sum"},
    {"text": "red", "aggregate": None},
    {"text": "red", "aggregate": ["max"]},
    {"text": "red", "aggregate": "mean", "words": True},
    {"text": "red", "words": 1},
    {"text": "red", "group": "no"},
    {"text": "red", "min_strength": ["weak"]},
    {"text": "red", "unlike": [{"video_id": "x"}]},
    {"text": "red", "unlike": [{"video_id": "x", "start_s": 0, "end_s": 1}]},
    {"text": "red", "unlike": {"video_id": "x", "start_s": 0}},
    {"text": "red", "unlike": ["x"]},
    {"text": "red", "unlike": [{"video_id": "x", "start_s": 0}] * 17},
    {"parts": []},
    {"parts": "red"},
    {"parts": [{}]},
    {"parts": [{"text": "red", "query_id": "x"}]},
    {"parts": [{"text": "red", "weight": 0}]},
    {"parts": [{"text": "red", "weight": "2"}]},
    {"parts": [{"text": "red", "weight": -1}]},
    {"parts": [{"text": "red"}, {"text": "red", "weight": -1}]},
    {"parts": [{"text": "red", "path": "/etc/passwd"}]},
    {"parts": [{"text": "red"}] * 17},
    {"text": "red", "parts": [{"text": "red"}]},
]


@pytest.mark.parametrize("body", HOSTILE_BODIES)
def test_bad_requests_get_a_reason(site, body) -> None:
    reply = site.post("/api/search", body)
    assert reply.status == 400, reply.body
    assert set(reply.json["error"]) == {"code", "message"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b'{"text": NaN}',
        b"[" * 100_000,
        b'{"text": 1e999}',
        b'{"top_k": ' + b"9" * 5000 + b', "text": "red"}',
    ],
)
def test_bad_json_gets_a_reason(site, content) -> None:
    reply = site.post("/api/search", content, Content_Type="application/json")
    assert reply.status == 400, reply.body


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "text",
    "query_id",
    "top_k",
    "offset",
    "rerank",
    "where",
    "video_id",
    "start_s",
    "question",
    "choices",
]
SANE = st.sampled_from(["red", 1, 0.5, ["red", "blue"], "duration_s > 2", 1000])


@settings(max_examples=120)
@given(
    path=st.sampled_from(["/api/search", "/api/similar", "/api/ask", "/api/ingest"]),
    body=st.dictionaries(st.sampled_from([*FIELDS, "folder", "x"]), SANE | JSON, max_size=5),
)
def test_no_body_makes_the_server_fail(site, path, body) -> None:
    try:
        content = json.dumps(body).encode()
    except ValueError:
        return
    reply = site.post(path, content, Content_Type="application/json")
    assert reply.status < 500, (path, body, reply.body)
    if reply.status >= 400:
        assert set(reply.json) == {"error"}


def test_huge_bodies_are_refused_before_they_are_read(site) -> None:
    big = site.post("/api/search", b" " * (2 << 20), Content_Type="application/json")
    assert big.status == 413
    announced = site.ask("POST", "/api/search/image", b"x", {"Content-Length": str(3 << 30)})
    assert announced.status == 413


def test_a_body_without_a_length_is_counted(site) -> None:
    pieces = (b" " * 65536 for _ in range(40))
    assert site.post("/api/search", pieces, Content_Type="application/json").status == 413


def malformed() -> dict[str, bytes]:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40)).save(stream, "PNG")
    png = stream.getvalue()
    return {
        "nothing": b"",
        "noise": bytes(range(256)) * 50,
        "cut": png[:40],
        "text": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "playlist": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "flipped": png[:20] + bytes(byte ^ 0x55 for byte in png[20:]),
    }


@pytest.mark.parametrize("name", sorted(malformed()))
@pytest.mark.parametrize("kind", ["image", "video"])
def test_malformed_uploads_are_told_apart_from_failures(site, kind, name) -> None:
    reply = site.post(f"/api/search/{kind}", malformed()[name], Content_Type=f"{kind}/x")
    assert reply.status in (400, 422), reply.body
    assert b"/tmp" not in reply.body and b"upload-" not in reply.body
    assert site.state.num_uploads == 0 and not list(site.state.uploads.iterdir())


def test_a_bomb_of_a_picture_is_refused(site) -> None:
    stream = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(stream, "PNG")
    assert site.post("/api/search/image", stream.getvalue(), Content_Type="image/png").status == 422


def test_the_client_says_what_went_wrong(site, client, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="filter"):
        client.search("red", where="nonsense")
    with pytest.raises(DataError, match="picture"):
        (tmp_path / "x.png").write_bytes(b"no picture")
        client.search(tmp_path / "x.png")
    with pytest.raises(DataError, match="no such file"):
        client.search(tmp_path / "absent.mp4")
    with pytest.raises(CapabilityError):
        client.search(tmp_path / "x.png", rerank=3)
    with pytest.raises(InvalidInput, match="is vlm serve running"):
        Client("http://127.0.0.1:9", timeout_s=2).search("red")
    for address in ("127.0.0.1:8000", "ftp://x", "", "http://"):
        with pytest.raises(InvalidInput, match="expected an address"):
            Client(address)
    assert issubclass(BusyError, Exception)


def test_the_client_sees_what_is_there(client, films, ids, tmp_path) -> None:
    info = client.info()
    assert (info["num_videos"], info["model_domain"]) == (6, "open")
    assert client.video(ids["blue"])["duration_s"] == pytest.approx(6, abs=0.11)
    assert client.download(ids["blue"], tmp_path / "copy.mp4") == (films / "blue.mp4").stat().st_size
    assert (tmp_path / "copy.mp4").read_bytes() == (films / "blue.mp4").read_bytes()
    with pytest.raises(FileExistsError):
        client.download(ids["blue"], tmp_path / "copy.mp4")
    assert client.thumbnail(ids["blue"], 1.0)[:2] == b"\xff\xd8"


def test_hits_have_the_fields_that_python_knows(site) -> None:
    hit = site.post("/api/search", {"text": "red"}).json["hits"][0]
    assert set(hit) == {field.name for field in dataclasses.fields(Hit)}


def test_a_hit_is_written_field_by_field() -> None:
    copy = Duplicate(
        video_id="b", path="/v/\udcff.mp4", start_s=1.0, end_s=2.0, own_start_s=3.0, own_end_s=4.0
    )
    hit = Hit(
        rank=1, video_id="a", path="/v/a.mp4", start_s=0.0, end_s=8.0, score=0.5, score_kind="itc",
        warning=None, strength="weak", duplicates=(copy,),
    )  # fmt: skip
    expected = dataclasses.asdict(hit)
    expected["duplicates"] = [{**dataclasses.asdict(copy), "path": "/v/\\udcff.mp4"}]
    assert hit_values(hit) == expected
    assert list(hit_values(hit)) == list(expected)
