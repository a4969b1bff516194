"""`vlm data pack` and `vlm data verify` as a user runs them: output and exit codes."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vlm.cli import main


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        with av.open(str(folder / name), "w") as output:
            stream = output.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(
                    np.full((32, 32, 3), number * 40, np.uint8), format="rgb24"
                )
                frame.pts, frame.time_base = number, Fraction(1, 10)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    (folder / "a.txt").write_text("something dark\n")
    (folder / "b.txt").write_text("something grey\n")
    return folder


def test_pack_a_folder_and_verify(tmp_path: Path, videos: Path, capsys) -> None:
    out = tmp_path / "shards"
    assert main(["data", "pack", "--folder", str(videos), "--out", str(out)]) == 0
    assert "2 videos" in capsys.readouterr().out
    assert main(["data", "verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"num_samples": 2, "findings": []}


def test_captions_for_missing_videos_are_named(tmp_path: Path, videos: Path, capsys) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([{"video": n, "caption": "x"} for n in ("a.mp4", "gone\n.mp4")]))
    line = ["data", "pack", "--annotations", str(captions), "--videos", str(videos), "--out"]
    assert main([*line, str(tmp_path / "s"), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 1
    assert [(item["item"], item["reason"]) for item in report["rejected"]] == [("gone\n.mp4", "missing")]
    assert main([*line, str(tmp_path / "t")]) == 3
    assert "rejected 'gone\\n.mp4': missing" in capsys.readouterr().out


def test_nothing_usable(tmp_path: Path, capsys) -> None:
    (tmp_path / "v").mkdir()
    assert main(["data", "pack", "--folder", str(tmp_path / "v"), "--out", str(tmp_path / "s")]) == 4
    assert main(["data", "pack", "--folder", str(tmp_path / "none"), "--out", str(tmp_path / "s")]) == 4
    assert main(["data", "verify", str(tmp_path / "v")]) == 4
    assert "vlm: " in capsys.readouterr().err


def test_damage_is_found(tmp_path: Path, videos: Path, capsys) -> None:
    out = tmp_path / "shards"
    main(["data", "pack", "--folder", str(videos), "--out", str(out)])
    tar = out / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.find(b"something dark")] ^= 1
    tar.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["data", "verify", str(out)]) == 5
    assert "checksum" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        ["pack"],
        ["pack", "--folder", "x"],
        ["pack", "--annotations", "a.json", "--out", "s"],
        ["pack", "--folder", "x", "--out", "s", "--max-shard-mb", "0"],
        ["verify"],
    ],
)
def test_wrong_flags(line: list[str]) -> None:
    assert main(["data", *line]) == 2


def test_unknown_programs_name_the_nearest(capsys) -> None:
    assert main(["data", "pakc"]) == 2
    assert "did you mean 'pack'" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "verify" in capsys.readouterr().err


def test_help_lists_the_programs(capsys) -> None:
    assert main(["data", "--help"]) == 0
    assert "Pack videos and captions into shards" in capsys.readouterr().out
    assert main(["data", "pack", "--help"]) == 0
    assert "example: vlm data pack" in capsys.readouterr().out
