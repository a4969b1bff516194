"""Hits for other programs: tables and markers read back, cuts that begin with the right frame."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vlm.cli import main
from vlm.errors import InvalidInput, RejectedItems
from vlm.retrieval.exports import export_hits
from vlm.serving.media.cutting import cut_hits
from vlm.types import Hit

LEVELS = 4  # brightness from one frame to the next


def write_counted(path: Path, times_ms: list[int], reordered: int) -> Path:
    """Write frames whose brightness tells their number, each shown from its time on."""
    import av

    with av.open(str(path), "w") as container:
        options = {"crf": "10", "preset": "veryfast", "bf": str(reordered), "g": "30"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times_ms):
            grey = np.full((48, 64, 3), (10 + LEVELS * number) % 240, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def first_number(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert frame.time == pytest.approx(0, abs=0.001)
        return round((float(frame.to_ndarray(format="rgb24").mean()) - 10) / LEVELS)


def hit_of(path: Path | str, start_s: float, end_s: float, rank: int = 1, **values) -> Hit:
    facts = {"video_id": "abc", "score": 0.5, "score_kind": "itc", **values}
    return Hit(rank=rank, path=str(path), start_s=start_s, end_s=end_s, **facts)


@pytest.mark.parametrize("reordered", [0, 3])
def test_cuts_begin_with_the_frame_on_screen(tmp_path, reordered) -> None:
    gaps = np.random.default_rng(1).integers(20, 140, 55)  # anything from 7 to 50 frames a second
    times = [0, *np.cumsum(gaps).tolist()]
    clip = write_counted(tmp_path / "vfr.mp4", times, reordered)
    starts = [0.0, 0.5, 1.234, 2.0, 2.999, 3.3]
    hits = [hit_of(clip, start, start + 0.7, rank) for rank, start in enumerate(starts, start=1)]
    assert cut_hits(hits, tmp_path / "cuts") == []
    files = sorted((tmp_path / "cuts").iterdir())
    assert [file.name for file in files][:2] == ["001-vfr-0.00s.mp4", "002-vfr-0.50s.mp4"]
    for start, file in zip(starts, files, strict=True):
        on_screen = int(np.searchsorted(times, 1000 * start + 1e-3, side="right")) - 1
        assert abs(first_number(file) - on_screen) <= 1, start


def test_what_cannot_be_cut_is_told_and_the_rest_is_there(tmp_path) -> None:
    clip = write_counted(tmp_path / "../odd name;$(x).mp4", list(range(0, 1000, 40)), 0)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    hits = [hit_of(tmp_path / "bad.mp4", 0, 1), hit_of(clip, 0.2, 0.8, 2), hit_of(tmp_path / "gone", 0, 1, 3)]
    failures = cut_hits(hits, tmp_path / "cuts")
    assert [(Path(path).name, reason) for path, reason, _ in failures] == [
        ("bad.mp4", failures[0][1]), ("gone", "missing"),
    ]  # fmt: skip
    assert [file.name for file in (tmp_path / "cuts").iterdir()] == ["002-odd-name-x-0.20s.mp4"]
    with pytest.raises(InvalidInput, match="not empty"):
        cut_hits(hits, tmp_path / "cuts")


@pytest.fixture
def hits(tmp_path) -> list[Hit]:
    clip = write_counted(tmp_path / "a & <b>.mp4", list(range(0, 8000, 40)), 0)  # 25 a second
    other = "/nowhere/bad\udcffname\n.mp4"
    return [hit_of(clip, 2.0, 4.0, 1, strength="strong"), hit_of(clip, 5.04, 6.0, 2), hit_of(other, 1, 2, 3)]


def test_a_table_reads_back(tmp_path, hits) -> None:
    export_hits(hits, tmp_path / "hits.csv", 'a "red"\nthing')
    with (tmp_path / "hits.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], float(row["start_s"]), row["strength"]) for row in rows] == [
        ("1", 2.0, "strong"), ("2", 5.04, ""), ("3", 1.0, ""),
    ]  # fmt: skip
    assert rows[0]["path"] == hits[0].path and rows[2]["path"] == "/nowhere/bad\\udcffname\n.mp4"
    assert {row["query"] for row in rows} == {'a "red" thing'}


def test_an_edit_list_counts_each_files_own_frames(tmp_path, hits) -> None:
    export_hits(hits, tmp_path / "hits.edl", "red")
    lines = (tmp_path / "hits.edl").read_text().splitlines()
    assert lines[:2] == ["TITLE: red", "FCM: NON-DROP FRAME"]
    events = [line.split() for line in lines if line[:3].isdigit()]
    assert [event[4:] for event in events] == [
        ["00:00:02:00", "00:00:04:00", "01:00:00:00", "01:00:02:00"],
        ["00:00:05:01", "00:00:06:00", "01:00:02:00", "01:00:02:24"],
        ["00:00:01:00", "00:00:02:00", "01:00:02:24", "01:00:03:24"],
    ]
    assert "* FROM CLIP NAME: a & <b>.mp4" in lines
    assert not any("\udcff" in line for line in lines)


def test_markers_lie_where_the_hits_begin(tmp_path, hits) -> None:
    export_hits(hits, tmp_path / "hits.fcpxml", "red & <blue>")
    root = ET.parse(tmp_path / "hits.fcpxml").getroot()
    assets = {asset.get("id"): asset for asset in root.iter("asset")}
    assert len(assets) == 2
    (clip, gone) = root.iter("asset-clip")
    assert assets[clip.get("ref")].get("name") == "a & <b>.mp4"
    assert clip.find("marker").get("note") == "red & <blue>"

    def seconds(text: str) -> float:
        return float(Fraction(text.removesuffix("s")))

    assert [seconds(m.get("start")) for m in clip.iter("marker")] == pytest.approx([2.0, 5.04], abs=0.02)
    assert [seconds(m.get("duration")) for m in clip.iter("marker")] == pytest.approx([2.0, 0.96], abs=0.04)
    assert [m.get("value")[:8] for m in clip.iter("marker")] == ["1 strong", "2 0.5000"]
    assert seconds(clip.get("duration")) == pytest.approx(8, abs=0.05)
    assert len(list(gone.iter("marker"))) == 1
    (source, _) = root.iter("media-rep")
    assert source.get("src").endswith("a%20%26%20%3Cb%3E.mp4")


def test_nothing_is_overwritten_and_unknown_kinds_are_refused(tmp_path) -> None:
    (tmp_path / "there.csv").write_text("mine")
    for name in ("there.csv", "x.txt", "no/folder.csv"):
        with pytest.raises(InvalidInput):
            export_hits([], tmp_path / name, "red")
    assert (tmp_path / "there.csv").read_text() == "mine"
    for suffix in ("csv", "edl", "fcpxml"):
        export_hits([], tmp_path / f"none.{suffix}", "")


def test_the_command_line_hands_hits_over(tmp_path, index, capsys) -> None:
    words = ["search", str(index), "a red thing", "--top-k", "2"]
    assert main([*words, "--export", str(tmp_path / "h.csv"), "--cuts", str(tmp_path / "cuts")]) == 0
    assert len((tmp_path / "h.csv").read_text().splitlines()) == 3
    assert len(list((tmp_path / "cuts").iterdir())) == 2
    assert main([*words, "--export", str(tmp_path / "h.csv")]) == InvalidInput.exit_code
    assert RejectedItems.exit_code == 3
