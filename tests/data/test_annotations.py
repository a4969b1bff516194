"""Each layout of annotations, its mistakes, and the files that belong to it."""

from __future__ import annotations

import csv
import datetime
import json
import sys
from pathlib import Path

import pytest

from vlm.data.annotations import Annotation, locate_videos, read_annotations, read_folder
from vlm.errors import DataError, MissingExtra


def captions_of(path: Path, layout: str = "auto") -> dict[str, tuple[str, ...]]:
    return {entry.video: entry.captions for entry in read_annotations(path, layout)}


def test_reference_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [
        {"video": "a.mp4", "caption": "a cat", "duration": 3.5},
        {"video": "b.mp4", "caption": [" a dog", "a brown dog", ""]},
        {"video": "a.mp4", "caption": "a small cat"},
        {"video": "a.mp4", "caption": "a cat"},
        {"video": ["c.mp4", "b.mp4"], "caption": "an animal"},
    ]
    path.write_text(json.dumps(rows))
    assert captions_of(path) == {
        "a.mp4": ("a cat", "a small cat"),
        "b.mp4": ("a dog", "a brown dog", "an animal"),
        "c.mp4": ("an animal",),
    }
    assert list(captions_of(path)) == ["a.mp4", "b.mp4", "c.mp4"]
    assert read_annotations(path)[0].metadata == {"duration": 3.5}


def test_reference_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"video": "a.mp4", "caption": ["First.", "Then more."]}]))
    assert captions_of(path, "reference-paragraph") == {"a.mp4": ("First. Then more.",)}


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", '[{"video": "a.mp4"}]', '[{"caption": "x"}]', '[{"video": 3, "caption": "x"}]', "[{",
     "\udcff", '[{"video": "a", "caption": [1]}]', '[{"video": [], "caption": "x"}]'],
)  # fmt: skip
def test_not_a_reference_list(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"a\.json") as caught:
        read_annotations(path)
    assert caught.value.reason == "bad_annotations"


def test_msrvtt(tmp_path: Path) -> None:
    path = tmp_path / "MSRVTT_JSFUSION_test.csv"
    path.write_text(
        "key,vid_key,video_id,sentence\n"
        'ret0,msr1,video1,"a man, and a dog"\nret1,msr2,video2,a car\nret2,msr1,video1,a walk\n'
    )
    assert captions_of(path) == {"video1": ("a man, and a dog", "a walk"), "video2": ("a car",)}


@pytest.mark.parametrize(
    "text",
    ["video_id\nvideo1\n", "", "video_id,sentence\nvideo1\n",
     "video_id,sentence\n,a man\n", "video_id,sentence\nvideo1,a man,more\n",
     'video_id,sentence\nvideo1,"a man\n'],
)  # fmt: skip
def test_not_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"a\.csv") as caught:
        read_annotations(tmp_path / "a.csv")
    assert caught.value.reason == "bad_annotations"


def test_any_table_by_its_usual_or_named_columns(tmp_path: Path) -> None:
    """The rest is metadata; a row without a caption stays, so that packing can count it."""
    rows = [("a.mp4", "a cat", "3.5"), ("b.mp4", "", ""), ("a.mp4", "a, small cat", "9")]
    for suffix, tab in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"t{suffix}"
        with path.open("w", newline="") as stream:
            csv.writer(stream, delimiter=tab).writerows([("file", "caption", "seconds"), *rows])
        first, second = read_annotations(path)
        assert (first.video, first.captions) == ("a.mp4", ("a cat", "a, small cat"))
        assert first.metadata == {"seconds": "3.5"}
        assert (second.video, second.captions) == ("b.mp4", ())
    named = read_annotations(tmp_path / "t.csv", video_column="file", caption_column="seconds")[0]
    assert (named.video, named.captions) == ("a.mp4", ("3.5", "9"))
    with pytest.raises(DataError, match="expected the column 'clip'.*--video-column"):
        read_annotations(tmp_path / "t.csv", video_column="clip")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="columns can be named"):
        read_annotations(tmp_path / "a.json", video_column="clip")


def test_parquet_says_what_the_csv_says(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "videoid": [7, 8, 7, 9],
        "caption": [["a cat", "a tom"], ["a dog"], ["a cat"], None],
        "made": [datetime.date(2020, 1, 2)] * 4,
        "score": [float("nan"), 0.5, 0.25, None],
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(rows), path, row_group_size=2)
    assert captions_of(path) == {"7": ("a cat", "a tom"), "8": ("a dog",), "9": ()}
    assert read_annotations(path)[1].metadata == {"made": "2020-01-02", "score": 0.5}
    json.dumps([entry.metadata for entry in read_annotations(path)], allow_nan=False)
    data = path.read_bytes()
    for damaged in (data[:-40], b"PAR1" + data[4:90] + b"PAR1", b"", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet"):
            read_annotations(path)


def test_parquet_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'videomamba-vlm\[parquet\]'"):
        read_annotations(tmp_path / "a.parquet")


def test_world_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    line = {"file": "clips/0.mp4", "caption": "a red 3 moves up", "scene": {"seed": 1}, "twin": None}
    other = {"file": "clips/1.mp4", "captions": ["a red 3 moves up", "a 3 rises"]}
    both = {"file": "clips/2.mp4", "captions": ["one", "two"], "caption": "three"}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(other) + "\n" + json.dumps(both))
    entry, several, all_of_it = read_annotations(path)
    assert (all_of_it.captions, all_of_it.metadata) == (("one", "two", "three"), {})
    assert several.captions == ("a red 3 moves up", "a 3 rises")
    assert entry.video == "clips/0.mp4"
    assert entry.captions == ("a red 3 moves up",)
    assert entry.metadata == {"scene": {"seed": 1}, "twin": None}


@pytest.mark.parametrize("line", ["[]", "{", '{"file": "a.mp4"}', '{"file": 1, "captions": ["x"]}'])
def test_not_a_world_manifest(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1"):
        read_annotations(tmp_path / "m.jsonl")


def test_a_missing_file_and_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(tmp_path / "none.json")
    with pytest.raises(DataError, match="--layout"):
        read_annotations(tmp_path / "a.xml")
    with pytest.raises(ValueError, match="layout must be one of"):
        read_annotations(tmp_path / "a.json", "other")


def test_folder_with_captions_beside_the_videos(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "b.MOV", "sub/c.webm", "d.mp4", "e.mp4", "notes.pdf"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("one\n\n two \n\t\n")
    (tmp_path / "b.json").write_text(json.dumps({"caption": "three", "licence": "CC0"}))
    (tmp_path / "sub/c.json").write_text(json.dumps(["four", " ", " five "]))
    (tmp_path / "e.txt").write_text(" \n\n")
    (tmp_path / "d.json").write_text(json.dumps("six"))
    found = {entry.video: entry for entry in read_folder(tmp_path)}
    assert list(found) == ["a.mp4", "b.MOV", "d.mp4", "e.mp4", "sub/c.webm"]
    assert found["b.MOV"].captions == ("three",)
    assert found["b.MOV"].metadata == {"licence": "CC0"}
    assert found["sub/c.webm"].captions == ("four", "five")
    assert found["d.mp4"].captions == ("six",)
    assert found["e.mp4"].captions == ()
    assert found["a.mp4"].captions == ("one", "two")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_characters_that_end_lines_elsewhere_end_none_here(tmp_path: Path, end: str) -> None:
    """``str.splitlines`` ends lines at all of them; in JSON and CSV they are characters like others."""
    caption = "one\u2028two\u0085three\x0cfour"
    row = json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False)
    for name, lines in (
        ("m.jsonl", [row.replace("\\f", " "), row.replace("\\f", " ")]),
        ("t.csv", ["file,caption", f"a.mp4,{caption}"]),
        ("q.tsv", ["file\tcaption", f'a.mp4\t"{caption}"']),
    ):
        (tmp_path / name).write_bytes(end.join([*lines, ""]).encode())
        (entry,) = read_annotations(tmp_path / name)
        assert entry.captions == (caption if ".jsonl" not in name else caption.replace("\x0c", " "),)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_bytes(end.join([caption, "five"]).encode())
    assert read_folder(tmp_path)[0].captions == (caption, "five")


def test_a_broken_sidecar_and_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json: not JSON"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none")


def test_videos_are_found_with_and_without_extension(tmp_path: Path) -> None:
    for name in ("video1.mp4", "video2.webm", "1004_a_00.01.02.345-00.01.04.567.avi", "clip."):
        (tmp_path / name).touch()
    names = ["video1", "video1.mp4", "video2", "1004_a_00.01.02.345-00.01.04.567", "clip.", "video3"]
    found = locate_videos([Annotation(video=name, captions=("x",)) for name in names], tmp_path)
    assert [item.path.name if item.path else item.reason for item in found] == [
        "video1.mp4", "video1.mp4", "video2.webm", "1004_a_00.01.02.345-00.01.04.567.avi", "clip.", "missing",
    ]  # fmt: skip


def test_a_name_too_long_for_any_file_is_missing(tmp_path: Path) -> None:
    """With an extension the second one is, too."""
    names = ["x" * 300, "y" * 253]
    found = locate_videos([Annotation(video=name, captions=("x",)) for name in names], tmp_path)
    assert [item.reason for item in found] == ["missing", "missing"]


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "a/../../secret.mp4", "", "a\0b"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.mp4").touch()
    (tmp_path / "videos").mkdir()
    (item,) = locate_videos([Annotation(video=name, captions=("x",))], tmp_path / "videos")
    assert item.path is None
    assert item.reason == "unsafe_name"


def test_files_in_circulation(shared: Path) -> None:
    """The real MSR-VTT 1k-A test set in both of its layouts names the same videos and captions."""
    folder = shared / "annotations" / "msrvtt"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    table = captions_of(folder / "MSRVTT_JSFUSION_test.csv")
    listed = captions_of(folder / "msrvtt_ret_test1k.json")
    assert len(table) == len(listed) == 1000
    assert {name.removesuffix(".mp4"): texts for name, texts in listed.items()} == table


def test_the_tables_of_several_projects_are_read_as_they_are(shared: Path) -> None:
    clips = captions_of(shared / "videos" / "captions.csv")
    listed = captions_of(shared / "annotations" / "mini" / "own_captions_umt_layout.json")
    assert clips == {name: texts for name, texts in listed.items() if name in clips}
    assert len(clips) > 60
    assert len(captions_of(shared / "annotations" / "didemo" / "tmass_didemo_test_label.csv")) > 900
    with pytest.raises(DataError, match="expected the column one of caption"):
        read_annotations(shared / "annotations" / "msrvtt" / "MSRVTT_train.9k.csv")
