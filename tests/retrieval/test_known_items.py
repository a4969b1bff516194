"""`vlm index check`: what it counts as found, its intervals, and what changed since the run before."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from vlm.errors import InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.quality.check import check_index, compare_runs, keep_run, read_runs
from vlm.retrieval.quality.known_items import KnownItem, read_known_items
from vlm.types import Duplicate, Hit

GOOD = "query,video,start_s,end_s\nred,{movies}/rgb.mp4,0,8\nyellow,{movies}/deep/yellow.mp4,,\n"


@pytest.fixture
def check(built, movies, tmp_path, call_vlm):
    """Write queries, run the command with --json, return (exit code, its output, its messages)."""

    def run(text: str, *flags: str):
        (tmp_path / "known.csv").write_text(text.format(movies=movies))
        words = ("index", "check", str(built), "--queries", str(tmp_path / "known.csv"), "--json", *flags)
        code, output, errors = call_vlm(*words)
        return code, json.loads(output) if output else None, errors

    return run


def test_counts_what_is_found(check) -> None:
    code, run, errors = check(GOOD)
    assert (code, run["before"], run["changes"], run["missing"]) == (0, None, None, [])
    assert [outcome["rank"] for outcome in run["outcomes"]] == [1, 1]
    assert run["recall"]["recall@1"]["value"] == 1.0
    # two videos found prove little: the binomial limit, not a point
    assert run["recall"]["recall@1"]["low"] == pytest.approx(0.025**0.5)


def test_a_moment_must_be_the_right_one(check) -> None:
    # the clip shows red, green and blue for eight seconds each
    _, run, _ = check("query,video,start_s,end_s\nblue,{movies}/rgb.mp4,0,8\nblue,{movies}/rgb.mp4,17,18\n")
    assert [outcome["rank"] for outcome in run["outcomes"]] == [None, 1]
    assert run["recall"]["recall@10"]["value"] == 0.5
    # both are of one video, which says nothing of others
    assert (run["recall"]["recall@10"]["low"], run["recall"]["recall@10"]["high"]) == (0.0, 1.0)


def test_the_next_run_is_compared(check, tmp_path, built) -> None:
    kept = tmp_path / "known.runs.jsonl"
    check(GOOD)
    code, run, _ = check(GOOD + "green,{movies}/rgb.mp4,0,4\n")
    assert (code, run["before"]["index"], run["changes"]["num_items"]) == (0, str(built), 2)
    assert run["changes"]["differences"]["recall@1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert len(read_runs(kept)) == 2
    assert not list(built.glob("*.jsonl"))
    code, run, _ = check("query,video\nsomething else,{movies}/grey.mp4\n")
    assert run["changes"] is None


def test_videos_are_named_by_path_or_identifier(check, built, movies, tmp_path) -> None:
    import os

    from vlm.retrieval import VideoIndex

    video = VideoIndex.open(built).snapshot.videos[0].video_id
    relative = os.path.relpath(movies / "rgb.mp4", tmp_path)
    code, run, errors = check(f"query,video\nred,{video}\nred,{relative}\nred,gone.mp4\n")
    assert code == 0 and len(run["outcomes"]) == 2
    assert [item["video"] for item in run["missing"]] == ["gone.mp4"]
    assert "not in the index, left out: gone.mp4" in errors
    code, _, errors = check("query,video\nred,gone.mp4\n")
    assert code == 4 and "holds none of the 1 videos" in errors


def test_fails_only_when_asked(check) -> None:
    bad = "query,video\nred,{movies}/rgb.mp4\nred,{movies}/grey.mp4\n"
    assert check(bad)[0] == 0
    assert check(bad, "--fail-below", "1=0.5")[0] == 0
    code, run, errors = check(bad, "--fail-below", "1=0.6")
    assert code == 3 and "recall@1 is below 0.6" in errors and run["outcomes"]
    for wrong in ("0.6", "7=0.5", "5=1.5", "5=x"):
        assert check(bad, "--fail-below", wrong)[0] == 2


def test_prints_for_people(built, movies, tmp_path, call_vlm) -> None:
    (tmp_path / "known.csv").write_text(GOOD.format(movies=movies))
    words = ("index", "check", str(built), "--queries", str(tmp_path / "known.csv"))
    code, output, _ = call_vlm(*words)
    assert code == 0 and "2 known items, model colours" in output and "recall@5" in output
    code, output, _ = call_vlm(*words)
    assert "over 2 items of both" in output and "+0.0    [+0.0, +0.0]" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns query, video"),
        ("query\nred\n", "expected the columns query, video"),
        ("query,video,mood\n", "expected the columns query, video"),
        ("query,query,video\n", "expected the columns query, video"),
        ("query,video\n", "holds no queries"),
        ("query,video\nred\n", "line 2: expected as many cells"),
        ("query,video\nred,a,b\n", "line 2: expected as many cells"),
        ("query,video\n ,a\n", "line 2: query and video must not be empty"),
        ("query,video,start_s\nred,a,3\n", "line 2: expected both start_s and end_s"),
        ("query,video,start_s,end_s\nred,a,3,3\n", "line 2: expected 0 <= start_s < end_s"),
        ("query,video,start_s,end_s\nred,a,nan,3\n", "line 2: start_s must be a number of seconds"),
        ("query,video,start_s,end_s\nred,a,0,3 s\n", "line 2: end_s must be a number of seconds"),
        ("query,video\nred,a\nblue,b\nred,a\n", "the query 'red' for 'a' is there 2 times"),
        ('query,video\n"red,a\n', "cannot be read as CSV"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message) -> None:
    (tmp_path / "known.csv").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_known_items(tmp_path / "known.csv")


def test_a_spreadsheet_s_mark_and_quotes_are_read(tmp_path) -> None:
    (tmp_path / "known.csv").write_bytes('\ufeffquery,video\n"a dog, ""Rex""",b.mp4\n'.encode())
    assert read_known_items(tmp_path / "known.csv") == [KnownItem(query='a dog, "Rex"', video="b.mp4")]
    (tmp_path / "known.csv").write_bytes(b"query,video\n\xff\xfe,b\n")
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_known_items(tmp_path / "known.csv")


@pytest.mark.parametrize(("start_s", "end_s", "found"), [(0, 4, False), (7.9, 8.1, True), (12, 20, False)])
def test_moments_overlap_by_more_than_a_border(start_s, end_s, found) -> None:
    hit = Hit(rank=1, video_id="v", path="p", start_s=4.0, end_s=12.0, score=1.0, score_kind="itc")
    item = KnownItem(query="q", video="p", start_s=start_s, end_s=end_s)
    assert (item.is_found_by(hit, "v"), item.is_found_by(hit, "w")) == (found, False)
    copy = Duplicate(
        video_id="w", path="q", start_s=hit.start_s, end_s=hit.end_s, own_start_s=20.0, own_end_s=28.0
    )
    hit = dataclasses.replace(hit, start_s=20.0, end_s=28.0, duplicates=(copy,))
    assert item.is_found_by(hit, "w") == found


def test_copies_of_one_video_are_all_found(tmp_path, clip, colours, make_encoder) -> None:
    scenes = [(colours.red, 8), (colours.green, 8), (colours.blue, 8)]
    shutil.copy(clip(tmp_path / "v" / "a.mp4", scenes, texture=1), tmp_path / "v" / "b.mp4")
    with (tmp_path / "v" / "b.mp4").open("ab") as file:
        file.write(b"\0\0\0\x08free")  # another file, the same footage
    index = VideoIndex.create(tmp_path / "i", model := make_encoder())
    index.add([tmp_path / "v"], model=model)
    items = [KnownItem(query="red", video=f"{name}.mp4", start_s=0.0, end_s=8.0) for name in "ab"]
    run = check_index(Searcher(index, model), items, tmp_path / "v")
    assert [outcome["rank"] for outcome in run["outcomes"]] == [1, 1]


def run_of(ranks: dict[str, int | None]) -> dict:
    fields = {"start_s": None, "end_s": None}
    outcomes = [
        {"query": name, "video": name, "video_id": name, "rank": r, **fields} for name, r in ranks.items()
    ]
    return {"format": "vlm-index-check/1", "outcomes": outcomes}


def test_a_fall_beyond_chance_is_said() -> None:
    names = [f"q{n}" for n in range(40)]
    good = run_of(dict.fromkeys(names, 1))
    fallen = run_of({name: None if n < 10 else 1 for n, name in enumerate(names)})
    slipped = run_of({name: None if n < 1 else 1 for n, name in enumerate(names)})
    changes = compare_runs(good, fallen)
    assert changes["is_worse"] and len(changes["lost"]) == 10 and not changes["found"]
    assert changes["differences"]["recall@1"]["value"] == pytest.approx(-0.25)
    assert not compare_runs(good, slipped)["is_worse"]
    back = compare_runs(fallen, good)
    assert not back["is_worse"] and len(back["found"]) == 10


def test_other_files_are_not_taken_for_runs(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_runs(path) == []
    keep_run(path, [], run_of({"a": 1}))
    assert read_runs(path) == [run_of({"a": 1})]
    for content in ("{", "[]\n", '{"format": "x", "outcomes": []}\n'):
        path.write_text(content)
        with pytest.raises(InvalidInput, match="not the runs of earlier checks"):
            read_runs(path)
