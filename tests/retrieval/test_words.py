"""What is written about videos: parsed, searched, fused with the model's ranking; indexes without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval import Mix, Part, Searcher, VideoIndex
from vlm.retrieval.strength import TextBank
from vlm.retrieval.words.gathering import keep_tags, parse_subtitles, passages_of
from vlm.retrieval.words.no_model import NoModel
from vlm.retrieval.words.search import fuse

SRT = """1
00:00:01,000 --> 00:00:03,500
<i>Where is</i> the harbour?

2
00:00:04,000 --> 00:00:06,000
{\\an8}Over there.

3
00:01:20,000 --> 00:01:22,000
A lighthouse!
"""
VTT = """WEBVTT

NOTE lighthouse is only said in this note

intro
00:17.000 --> 00:19.000 align:start
The tide <c.yellow>turns</c>
"""


def test_subtitles_are_read_with_their_times() -> None:
    assert [p.text.split() for p in parse_subtitles(SRT)] == [
        ["Where", "is", "the", "harbour?", "Over", "there."], ["A", "lighthouse!"],
    ]  # fmt: skip
    assert [(p.start_s, p.end_s) for p in parse_subtitles(SRT)] == [(1.0, 6.0), (80.0, 82.0)]
    (cue,) = parse_subtitles(VTT)
    assert (cue.text.split(), cue.start_s) == (["The", "tide", "turns"], 17.0)


@pytest.mark.parametrize("content", ["", "\0\0", "00:00 --> x", "-->" * 9000, "1\n00:00:01,0 --> 00:00:02,0"])
def test_junk_is_no_subtitle(content) -> None:
    assert list(parse_subtitles(content)) == []


def test_tags_are_kept_bounded() -> None:
    assert json.loads(keep_tags({"title": "Sea", "encoder": "Lavf", "comment": " "})) == {"title": "Sea"}
    many = {name: "x" * 1000 for name in ("title", "comment", "description", "synopsis", "artist", "album")}
    kept = keep_tags(many)
    assert len(kept) <= 4000 and json.loads(kept)["title"] == "x" * 1000


def test_ranks_are_fused_by_their_reciprocals() -> None:
    fused = dict(fuse([[7, 8, 9], [9, 5]]))
    assert fused == pytest.approx({7: 1 / 61, 8: 1 / 62, 9: 1 / 63 + 1 / 61, 5: 1 / 62})
    assert [item for item, _ in fuse([[7, 8, 9], [9, 5]])] == [9, 7, 5, 8]


@pytest.fixture(scope="module")
def library(tmp_path_factory, clip_writer) -> Path:
    """Videos with names, folders, tags, captions and subtitles."""
    folder = tmp_path_factory.mktemp("library")
    red, green, grey = (220, 20, 20), (20, 200, 20), (125, 125, 125)
    clip_writer(folder / "Holidays2019" / "IMG_0042-parisBridge.mp4", [(red, 12)])
    clip_writer(folder / "work" / "talk.mp4", [(grey, 30)], tags={"title": "Budget meeting", "encoder": "x"})
    clip_writer(folder / "work" / "film.mp4", [(green, 90)])
    (folder / "work" / "film.en.srt").write_text(SRT)
    (folder / "work" / "film.info.json").write_text(
        json.dumps({"title": "An old mill", "tags": ["wheel", 3]})
    )
    (folder / "work" / "talk.txt").write_bytes("Frau Müller erklärt".encode("latin-1"))
    (folder / "work" / "filmography.txt").write_text("zebra")  # another file, not this video's
    os.symlink("/dev/zero", folder / "work" / "talk.vtt")
    return folder


def indexed(library: Path, folder: Path, model) -> Searcher:
    index = VideoIndex.create(folder / "i", model)
    assert not index.add([library], model=model).rejected
    return Searcher(index, model)


@pytest.fixture(scope="module")
def wordy(library, tmp_path_factory) -> Searcher:
    return indexed(library, tmp_path_factory.mktemp("none"), NoModel())


def names(hits) -> list[str]:
    return [Path(hit.path).name for hit in hits]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("paris", "IMG_0042-parisBridge.mp4"),
        ("bridges", "IMG_0042-parisBridge.mp4"),
        ("holidays", "IMG_0042-parisBridge.mp4"),
        ("2019", "IMG_0042-parisBridge.mp4"),
        ("the budget", "talk.mp4"),
        ("MULLER", "talk.mp4"),
        ("mill wheel", "film.mp4"),
    ],
)
def test_words_are_found_wherever_they_are_written(wordy, text, name) -> None:
    hits = wordy.search(text)
    assert names(hits) == [name]
    assert (hits[0].score_kind, hits[0].strength) == ("words", None) and hits[0].score > 0


def test_subtitles_lead_to_their_moment(wordy) -> None:
    (late,) = wordy.search("lighthouse")
    assert late.start_s <= 80 < late.end_s
    (early,) = wordy.search("harbour")
    assert early.start_s <= 3 < early.end_s and early.start_s == 0


@pytest.mark.parametrize(
    "text", ["zebra", "encoder", "?!", '"', "paris) OR (x", "NEAR(a b)", "par*", "text : x"]
)
def test_what_is_not_written_is_not_found_and_nothing_is_syntax(wordy, text) -> None:
    assert names(wordy.search(text)) == (["IMG_0042-parisBridge.mp4"] if "paris" in text else [])


def test_filters_rejections_and_pages_hold_for_words(wordy) -> None:
    hits = wordy.search("work paris")
    assert len(hits) == 3
    assert wordy.search("work paris", top_k=1, offset=1) == hits[1:2]
    assert set(names(wordy.search("work paris", where="duration_s < 20"))) == {"IMG_0042-parisBridge.mp4"}
    with pytest.raises(CapabilityError):
        wordy.search("work", min_strength="weak")
    with pytest.raises(CapabilityError):
        wordy.search("work", rerank=3)


def test_both_rankings_count(library, tmp_path, make_encoder) -> None:
    searcher = indexed(library, tmp_path, make_encoder())
    assert names(searcher.search("green"))[0] == "film.mp4"
    plain = searcher.search("green paris")
    both = searcher.search("green paris", words=True)
    assert {hit.score_kind for hit in plain} == {"itc"} and {hit.score_kind for hit in both} == {"rrf"}
    # second or third to the model, first to the words
    rank = names(plain).index("IMG_0042-parisBridge.mp4") + 1
    score = next(hit.score for hit in both if "paris" in hit.path)
    assert score == pytest.approx(1 / (60 + rank) + 1 / 61)
    # a moment that subtitles tell, where they rank the video higher than the model does
    (hit,) = [hit for hit in searcher.search("red lighthouse", words=True) if hit.path.endswith("film.mp4")]
    assert hit.start_s <= 80 < hit.end_s
    with pytest.raises(CapabilityError, match="only a text"):
        searcher.search(np.zeros((32, 32, 3), np.uint8), words=True)
    with pytest.raises(InvalidInput, match="aggregate"):
        searcher.search("green", words=True, aggregate="mean")


def test_half_a_character_beside_a_video_spoils_nothing(tmp_path, clip_writer) -> None:
    clip_writer(tmp_path / "v" / "a.mp4", [((9, 9, 9), 2)])
    (tmp_path / "v" / "a.info.json").write_text('{"title": "holiday \\ud83d"}')
    assert names(indexed(tmp_path / "v", tmp_path, NoModel()).search("holiday")) == ["a.mp4"]


@pytest.mark.parametrize("group", [True, False])
def test_a_strong_hit_behind_weak_ones_is_shown(tmp_path, clip_writer, make_encoder, group) -> None:
    model = make_encoder()
    for number in range(4):  # named like the text, and not at all like it
        clip_writer(tmp_path / "v" / f"red-{number}.mp4", [((20, 20, 30 + 60 * number), 2)])
    clip_writer(tmp_path / "v" / "other.mp4", [((220, 20, 20), 2)])
    index = indexed(tmp_path / "v", tmp_path, model).index
    searcher = Searcher(
        index, model, bank=TextBank(model, ("grey", "yellow", "grey", "yellow", "grey", "grey"))
    )
    assert [hit.strength for hit in searcher.search("red", words=True)][0] == "unrelated"
    for top_k in (1, 2, 10):
        hits = searcher.search("red", words=True, group=group, min_strength="strong", top_k=top_k)
        assert names(hits) == ["other.mp4"], top_k


def test_without_a_model_only_one_thing_is_looked_for(wordy) -> None:
    with pytest.raises(CapabilityError, match="searched by one text"):
        wordy.search(Mix((Part("paris"), Part("work"))))
    with pytest.raises(CapabilityError, match="no scores of segments"):
        wordy.search("paris", aggregate="mean")


def test_texts_beside_a_video_are_read_anew(library, wordy) -> None:
    video = next(v for v in wordy.index.snapshot.videos if v.path.endswith(b"film.mp4"))
    before = list(passages_of(video, {}))
    (library / "work" / "film.txt").write_text("a narrow boat")
    try:
        assert [p.text for p in passages_of(video, {}) if p not in before] == ["a narrow boat"]
        again = Searcher(VideoIndex.open(wordy.index.folder), NoModel())
        assert names(again.search("boat")) == ["film.mp4"]
    finally:
        (library / "work" / "film.txt").unlink()


def test_a_picture_finds_the_frame_it_is_of(tmp_path, clip_writer) -> None:
    import av

    rng = np.random.default_rng(3)
    pictures = [
        np.kron(rng.integers(0, 255, (6, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8) for _ in "abc"
    ]
    for name, picture in zip("abc", pictures, strict=True):
        (tmp_path / "v").mkdir(exist_ok=True)
        with av.open(str(tmp_path / "v" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=4)
            stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
            for _ in range(16):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
    index = VideoIndex.create(tmp_path / "i", NoModel())
    index.add([tmp_path / "v"], model=NoModel())
    searcher = Searcher(index, NoModel())
    for name, picture in zip("abc", pictures, strict=True):
        path = tmp_path / f"{name}.png"
        Image.fromarray(picture).resize((60, 50)).save(path)
        hits = searcher.search(path)
        assert names(hits) == [f"{name}.mp4"] and hits[0].score_kind == "look"
        assert hits[0].score == pytest.approx(1, abs=0.2)
        assert names(searcher.search(tmp_path / "v" / f"{name}.mp4")) == [f"{name}.mp4"]


def test_the_command_line_builds_and_searches_without_a_model(library, tmp_path, capsys) -> None:
    from vlm.cli import main

    index = str(tmp_path / "i")
    assert main(["index", "build", str(library), "--out", index, "--model", "none"]) == 0
    assert main(["index", "build", str(library), "--out", index, "--model", "none"]) == 0
    assert main(["index", "verify", index]) == 0
    capsys.readouterr()
    assert main(["search", index, "lighthouse"]) == 0
    printed = capsys.readouterr().out
    assert "film.mp4" in printed and " words " in printed
    assert main(["search", index, "zebra"]) == 0
    assert main(["index", "update", index]) == 0
    assert main(["index", "compact", index]) == 0
    assert main(["search", index, "budget"]) == 0
    assert "talk.mp4" in capsys.readouterr().out
