"""Each layout of annotations, its mistakes, and the files that belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm.data.annotations import Annotation, locate_videos, read_annotations, read_folder
from vlm.errors import DataError


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


@pytest.mark.parametrize("text", ["video_id\nvideo1\n", "", "video_id,sentence\nvideo1\n"])
def test_not_msrvtt(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match="video_id"):
        read_annotations(tmp_path / "a.csv")


def test_world_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    line = {"file": "clips/0.mp4", "caption": "a red 3 moves up", "scene": {"seed": 1}, "twin": None}
    other = {"file": "clips/1.mp4", "captions": ["a red 3 moves up", "a 3 rises"]}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(other) + "\n")
    entry, several = read_annotations(path)
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
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.json").write_text(json.dumps({"caption": "three", "licence": "CC0"}))
    (tmp_path / "sub/c.json").write_text(json.dumps(["four", "five"]))
    (tmp_path / "d.json").write_text(json.dumps("six"))
    found = {entry.video: entry for entry in read_folder(tmp_path)}
    assert list(found) == ["a.mp4", "b.MOV", "d.mp4", "e.mp4", "sub/c.webm"]
    assert found["b.MOV"].captions == ("three",)
    assert found["b.MOV"].metadata == {"licence": "CC0"}
    assert found["sub/c.webm"].captions == ("four", "five")
    assert found["d.mp4"].captions == ("six",)
    assert found["e.mp4"].captions == ()
    assert [caption.strip() for caption in found["a.mp4"].captions if caption] == ["one", "two"]


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
