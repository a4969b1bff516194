"""`vlm data pack` and `vlm data verify` as a user runs them: output and exit codes."""

from __future__ import annotations

import errno
import json
import os
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


def test_reencode(tmp_path: Path, videos: Path, capsys) -> None:
    out = tmp_path / "shards"
    assert main(["data", "pack", "--folder", str(videos), "--out", str(out), "--reencode", "16"]) == 0
    assert main(["data", "describe", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["height"]["max"] == 16
    assert main(["data", "pack", "--folder", str(videos), "--out", str(out), "--reencode"]) == 4
    assert "another input" in capsys.readouterr().err


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


def test_describe(tmp_path: Path, videos: Path, capsys) -> None:
    out = tmp_path / "shards"
    main(["data", "pack", "--folder", str(videos), "--out", str(out)])
    capsys.readouterr()
    assert main(["data", "describe", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 2
    assert report["total_duration_s"] == pytest.approx(1.0, abs=0.01)
    assert report["width"] == {"min": 32, "median": 32, "max": 32}
    assert report["codecs"] == {"h264": 2}
    assert report["frequent_words"] == {"something": 2, "dark": 1, "grey": 1}
    assert main(["data", "describe", str(out)]) == 0
    assert "h264 2" in capsys.readouterr().out


def test_a_full_disk_leaves_what_is_done(tmp_path: Path, videos: Path, capsys, monkeypatch) -> None:
    """The shard that no longer fits is not there; with space again, the work goes on."""
    for name in ("c", "d", "e"):
        (videos / f"{name}.mp4").write_bytes((videos / "a.mp4").read_bytes() + bytes(600_000))
        (videos / f"{name}.txt").write_text(f"copy {name}")
    line = ["data", "pack", "--folder", str(videos), "--max-shard-mb", "1", "--out"]
    assert main([*line, str(tmp_path / "whole")]) == 0
    original = os.replace

    def full(source: object, target: object) -> None:
        if str(target).endswith("shard-000001.tar"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        original(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full)
    assert main([*line, str(tmp_path / "s")]) == 6
    assert "no space left" in capsys.readouterr().err
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert (tmp_path / "s" / "shard-000000.tar").exists()
    monkeypatch.setattr(os, "replace", original)
    assert main([*line, str(tmp_path / "s")]) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        ["pack"],
        ["pack", "--folder", "x"],
        ["pack", "--annotations", "a.json", "--out", "s"],
        ["pack", "--folder", "x", "--out", "s", "--max-shard-mb", "0"],
        ["pack", "--folder", "x", "--out", "s", "--reencode", "8"],
        ["pack", "--annotations", "a.json", "--videos", "v", "--out", "s", "--video-column", "x"],
        ["pack", "--folder", ".", "--out", "s", "--layout", "folder"],
        ["pack", "--folder", ".", "--out", "s", "--caption-column", "x"],
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
