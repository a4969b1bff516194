"""Merging joins what several indexes hold, each content once; exporting gives it away whole."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from vlm.errors import InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.upkeep.exporting import COLUMNS, export
from vlm.retrieval.upkeep.merging import merge


@pytest.fixture
def pair(tmp_path, clip, colours, make_encoder):
    """Two indexes that share one content under two names, and each have a broken file."""
    model = make_encoder()
    for name, shades in (("a", ("red", "green")), ("b", ("blue", "yellow"))):
        for shade in shades:
            clip(tmp_path / name / f"{shade}.mp4", [(getattr(colours, shade), 9), (colours.grey, 8)])
        (tmp_path / name / "broken.mp4").write_text("broken")
    shutil.copy(tmp_path / "a" / "red.mp4", tmp_path / "b" / "copy.mp4")
    for name in "ab":
        VideoIndex.create(tmp_path / f"i{name}", model).add([tmp_path / name], model=model)
    return tmp_path


def names(index: VideoIndex) -> list[str]:
    return sorted(os.path.basename(os.fsdecode(video.path)) for video in index.snapshot.videos)


def test_holds_each_content_once(pair, make_encoder, contents) -> None:
    model = make_encoder()
    report = merge([pair / "ia", pair / "ib"], pair / "out")
    assert (report.num_added, report.num_unchanged, model.num_clips) == (4, 1, 0)
    index = VideoIndex.open(pair / "out")
    assert names(index) == ["blue.mp4", "green.mp4", "red.mp4", "yellow.mp4"]
    assert index.verify() == [] and index.info()["num_rejected"] == 2
    # equal to an index that was built of those files at once
    built = VideoIndex.create(pair / "built", model)
    built.add([pair / "a", *(pair / "b" / f"{name}.mp4" for name in ("blue", "yellow"))], model=model)
    assert contents(pair / "out") == contents(pair / "built")
    hits = [Searcher(VideoIndex.open(pair / i), model).search("blue", rerank=4) for i in ("out", "built")]
    key = [[(hit.path, hit.start_s, hit.score) for hit in found] for found in hits]
    assert sorted(key[0]) == sorted(key[1])
    # the folders are known: the next update brings in what was left out
    assert VideoIndex.open(pair / "out").update(model=model).num_added == 1


def test_merging_again_adds_nothing(pair) -> None:
    merge([pair / "ia"], pair / "out")
    report = merge([pair / "ia", pair / "ib"], pair / "out")
    assert (report.num_added, report.num_unchanged) == (2, 3)
    generation = VideoIndex.open(pair / "out").snapshot.generation
    assert merge([pair / "ib", pair / "ia"], pair / "out").num_added == 0
    assert VideoIndex.open(pair / "out").snapshot.generation == generation


def test_one_path_with_two_contents(pair, clip, colours, make_encoder) -> None:
    model = make_encoder()
    shutil.copytree(pair / "ia", pair / "old")
    clip(pair / "a" / "red.mp4", [(colours.blue, 3)])
    VideoIndex.open(pair / "ia").update(model=model)
    report = merge([pair / "ia", pair / "old"], pair / "out")
    assert [(item.reason, os.path.basename(os.fsdecode(item.path))) for item in report.rejected] == [
        ("same_path", "red.mp4")
    ]
    hits = Searcher(VideoIndex.open(pair / "out"), model).search("blue")
    assert hits[0].path.endswith("red.mp4") and hits[0].end_s == pytest.approx(3)


@pytest.mark.parametrize(
    ("model_options", "index_options", "words"),
    [
        ({"fingerprint": "colours-2" * 4}, {}, "model"),
        ({"num_frames": 8}, {}, "preprocessing"),
        ({}, {"segment_s": 4.0, "stride_s": 4.0}, "segment length"),
        ({}, {"store_tokens": "none"}, "stored features"),
        ({}, {"segmentation": "shots"}, "segmentation"),
    ],
)
def test_unequal_indexes_are_refused(pair, make_encoder, model_options, index_options, words) -> None:
    VideoIndex.create(pair / "other", make_encoder(**model_options), **index_options)
    with pytest.raises(InvalidInput, match=rf"differ in .*{words}.*vlm index build PATH"):
        merge([pair / "ia", pair / "other"], pair / "out")
    assert not (pair / "out").exists()
    with pytest.raises(InvalidInput, match="one of the indexes to merge"):
        merge([pair / "ia", pair / "ib"], pair / "ib")


@pytest.mark.parametrize("table", ["jsonl", "csv", "parquet"])
def test_export_holds_every_segment(built, tmp_path, table, make_encoder) -> None:
    if table == "parquet":
        pytest.importorskip("pyarrow")
    folder = shutil.copytree(built, tmp_path / "copy")
    index = VideoIndex.open(folder)
    index.remove([next(v.video_id for v in index.snapshot.videos if v.path.endswith(b"grey.mp4"))])
    metadata = export(index, tmp_path / "out", table)
    assert json.loads((tmp_path / "out" / "metadata.json").read_text()) == metadata
    for name, values in metadata["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == values["sha256"]
    vectors = np.load(tmp_path / "out" / "vectors.npy")
    assert vectors.dtype == np.float16 and len(vectors) == metadata["num_segments"] == 8
    path = tmp_path / "out" / f"segments.{table}"
    if table == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    elif table == "csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [int(row["row"]) for row in rows] == list(range(8)) and tuple(rows[0]) == COLUMNS
    # searching what was exported, by hand, gives the index's own answer
    model = make_encoder()
    query = model.encode_text(["blue"]).embedding[0].numpy()
    best = rows[int(np.argmax(vectors.astype(np.float64) @ query))]
    hit = Searcher(index, model).search("blue", top_k=1)[0]
    assert (best["video_id"], best["path"], float(best["start_s"])) == (hit.video_id, hit.path, hit.start_s)
    with pytest.raises(InvalidInput, match="exists; choose another place"):
        export(index, tmp_path / "out", table)


def test_a_failed_export_leaves_nothing(built, tmp_path, monkeypatch) -> None:
    import vlm.retrieval.upkeep.exporting as exporting

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_write_jsonl", fail)
    with pytest.raises(KeyboardInterrupt):
        export(VideoIndex.open(built), tmp_path / "deep" / "out")
    assert os.listdir(tmp_path / "deep") == []


def test_the_command_line(pair, call_vlm) -> None:
    out = str(pair / "out")
    code, output, _ = call_vlm("index", "merge", str(pair / "ia"), str(pair / "ib"), "--out", out, "--json")
    assert code == 0 and json.loads(output)["num_added"] == 4
    code, output, _ = call_vlm("index", "export", out, "--out", str(pair / "e"), "--table", "csv")
    assert code == 0 and output.startswith("16 segments of 4 videos")
