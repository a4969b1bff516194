"""Cleaning: each rule by hand, every caption accounted for, and copies of videos found, not neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm.cli import main
from vlm.data.annotations import Annotation, read_annotations, read_rows
from vlm.data.curation.cleaning import CleaningRules, clean_captions, clean_text
from vlm.data.curation.fingerprints import fingerprint, near_videos
from vlm.data.decoding import open_video
from vlm.data.reencoding import Reencoding, reencode


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  man\n walks\t", "a man walks"), ("a &amp; b &lt;3", "a & b <3"),
        ("<b>a man</b> <br/>walks", "a man walks"), ("see https://x.org/a?b=1 a man", "see a man"),
        ("mail me@x.org now", "mail now"), ("cafe\u0301 noir", "caf\u00e9 noir"),
        ("a\x00b\u200bc \x1b[31md", "a b c [31md"), ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
        ("\ud800x y", "x y"),
    ],
)  # fmt: skip
def test_texts_by_hand(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean
    assert clean_text(clean) == clean


def test_every_caption_is_kept_or_counted() -> None:
    rows = [
        Annotation(video="a", captions=("A man walks.", "a man WALKS", "word"), metadata={"n": 1}),
        Annotation(video="b", captions=("", "  ", "123 45", "go go go go now")),
        Annotation(video="a", captions=("a <i>dog</i> runs", "x " * 11)),
        Annotation(video="c", captions=("一个男人在走路", "the same text")),
        Annotation(video="d", captions=("the same text!", "one of d")),
        Annotation(video="e", captions=("The same text",)),
    ]
    kept, report = clean_captions(rows, CleaningRules(max_words=10, max_videos=2))
    assert {entry.video: entry.captions for entry in kept} == {
        "a": ("A man walks.", "a dog runs"), "c": ("一个男人在走路",), "d": ("one of d",),
    }  # fmt: skip
    assert kept[0].metadata == {"n": 1}
    assert report.captions == {
        "double": 1, "too_short": 1, "empty": 2, "no_letters": 1, "repetitive": 1, "too_long": 1,
        "everywhere": 3,
    }  # fmt: skip
    assert report.num_videos == (5, 3)
    before, after = report.num_captions
    assert (before, after) == (14, 4)
    assert before == after + report.captions.total()
    assert report.num_changed == 1
    assert {(item.item, item.reason) for item in report.rejected} == {
        ("b", "no_caption"),
        ("e", "no_caption"),
    }


@pytest.mark.parametrize("wrong", [{"min_words": 0}, {"max_words": 1}, {"max_videos": 0}])
def test_impossible_rules(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 <= min_words"):
        CleaningRules(**wrong)


def test_real_captions_survive(shared: Path) -> None:
    """What people wrote of clips for benchmarks is mostly clean already."""
    rows = read_rows(shared / "annotations" / "msrvtt" / "msrvtt_ret_test1k.json")
    kept, report = clean_captions(rows)
    assert report.num_captions[1] > 990
    assert report.num_captions[0] == report.num_captions[1] + report.captions.total()
    assert len(kept) == report.num_videos[1]


def moving(seed: int, count: int = 24) -> list[np.ndarray]:
    """Blurred noise that drifts: as rich as a natural picture, and another for each seed."""
    rng = np.random.default_rng(seed)
    wide = np.kron(rng.integers(0, 256, (12, 40)), np.ones((16, 16)))
    return [
        np.repeat(wide[:128, 4 * n : 4 * n + 160, None], 3, axis=2).astype(np.uint8) for n in range(count)
    ]


def test_copies_are_found_and_others_are_not(tmp_path: Path, encode) -> None:
    for seed in range(6):
        encode(tmp_path / f"{seed}.mp4", moving(seed), preset="ultrafast")
    copy = reencode(open_video(tmp_path / "2.mp4"), Reencoding(short_side=64, quality=35))
    encode(tmp_path / "black.mp4", [np.zeros((64, 64, 3), np.uint8)] * 24)
    encode(tmp_path / "dark.mp4", [np.full((64, 64, 3), 9, np.uint8)] * 24)
    encode(tmp_path / "slow.mp4", moving(3), fps=10)
    sources = [tmp_path / f"{seed}.mp4" for seed in range(6)]
    prints = [fingerprint(source) for source in [*sources, copy]]
    prints += [fingerprint(tmp_path / f"{name}.mp4") for name in ("black", "dark", "slow")]
    (pair,) = near_videos(prints)
    assert (pair.first, pair.second) == (2, 6)
    assert [(near.first, near.second) for near in near_videos(prints[6:7], prints)] == [(0, 2), (0, 6)]
    assert near_videos([], prints) == near_videos(prints[:1]) == []


def test_blocks_find_what_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((40, 2048)) < 0.2
    from vlm.data.curation.fingerprints import Fingerprint

    prints = [
        Fingerprint(base[rng.integers(40)] ^ (rng.random(2048) < 0.03), float(rng.uniform(1, 6)))
        for _ in range(1300)
    ]
    expected = []
    for second in range(0, 1300, 7):
        for first in range(second):
            a, b = prints[first], prints[second]
            fits = b.duration_s >= min(0.9 * a.duration_s, a.duration_s - 0.5)
            if not fits or b.duration_s > max(a.duration_s / 0.9, a.duration_s + 0.5):
                continue
            if 1 - (a.bits & b.bits).sum() / (a.bits | b.bits).sum() <= 0.3:
                expected.append((first, second))
    found = [(near.first, near.second) for near in near_videos(prints) if near.second % 7 == 0]
    assert found == sorted(expected)
    assert len(found) > 100


def test_as_a_user_runs_it(tmp_path: Path, encode, capsys) -> None:
    for number, name in enumerate(("a.mp4", "b.mp4", "d.mp4")):
        encode(tmp_path / name, moving(number), preset="ultrafast")
    (tmp_path / "c.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    captions = tmp_path / "captions.csv"
    captions.write_text(
        "file,caption\na.mp4,a cat &amp; a dog\nb.mp4,x\nc.mp4,a third one\n"
        "d.mp4,the last\ngone.mp4,not there\n"
    )
    out = tmp_path / "clean.json"
    line = ["data", "clean", str(captions), "--videos", str(tmp_path), "--out", str(out)]
    assert main([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_videos"] == {"before": 5, "after": 2}
    assert report["num_captions"] == {"before": 5, "after": 2}
    assert report["videos_dropped_by_reason"] == {"no_caption": 1, "missing": 1, "near_duplicate": 1}
    assert ["c.mp4", "near_duplicate", "looks like a.mp4, distance 0.000"] in report["videos_dropped"]
    assert [(e.video, e.captions) for e in read_annotations(out)] == [
        ("a.mp4", ("a cat & a dog",)), ("d.mp4", ("the last",)),
    ]  # fmt: skip
    assert main(line) == 4
    assert "exists already" in capsys.readouterr().err
    assert main([*line[:-1], str(tmp_path / "other.json")]) == 0
    assert "videos 5 -> 2, captions 5 -> 2, 1 changed" in capsys.readouterr().out
    assert main([*line[:-1], str(tmp_path / "third.json"), "--min-words", "0"]) == 2


def test_metadata_does_not_replace_what_was_cleaned(tmp_path: Path) -> None:
    manifest, out = tmp_path / "m.jsonl", tmp_path / "clean.json"
    row = {
        "file": "a.mp4",
        "captions": ["a cat &amp; a dog"],
        "caption": "a <b>dog</b>",
        "video": "b.mp4",
        "n": 1,
    }
    manifest.write_text(json.dumps(row))
    assert main(["data", "clean", str(manifest), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == [{"video": "a.mp4", "caption": ["a cat & a dog", "a dog"], "n": 1}]
