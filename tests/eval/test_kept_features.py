"""`vlm eval retrieval --cache`: killed and run again, in parts, in processes; and from a file of features."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from vlm.cli import main
from vlm.evaluation import read_card


@pytest.fixture
def command(world_folder, model_folder):
    named = [
        "--protocol",
        "world",
        "--annotations",
        world_folder / "manifest.jsonl",
        "--videos",
        world_folder,
    ]
    quick = ["--model", model_folder, "--set", "bootstrap.resamples=100", "--set", "rerank_k=3"]
    return ["eval", "retrieval", *map(str, [*named, *quick]), "--no-test-time-controls"]


def files_in(cache):
    return sorted(path.name for path in cache.rglob("*.npz"))


def test_a_killed_run_goes_on_where_it_was(command, tmp_path):
    """Killed when the seventh video is on disk, the next run encodes the other thirteen, no video twice."""
    cache, out = tmp_path / "cache", tmp_path / "card.json"
    arguments = [*command, "--cache", str(cache), "--out", str(out)]
    killed = subprocess.run(
        [sys.executable, "-m", "vlm", *arguments, "--batch-size", "1"],
        env={**os.environ, "CRASH_AT": "after-rename:8"},  # the first file is the key
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    written = files_in(cache)
    assert len(written) == 7
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")}
    assert main(arguments) == 0
    resumed = read_card(out)
    assert resumed["cost"]["videos_encoded"] == 13
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert len(files_in(cache)) == 20
    assert main([*command, "--out", str(out)]) == 0
    unbroken = read_card(out)
    for direction, kinds in unbroken["results"].items():
        for kind, block in kinds.items():
            found = {name: entry["value"] for name, entry in resumed["results"][direction][kind].items()}
            wanted = {name: entry["value"] for name, entry in block.items()}
            assert found == pytest.approx(wanted, abs=0.005)


def test_parts_and_processes_fill_one_cache(command, tmp_path, capsys):
    cache, out = tmp_path / "cache", tmp_path / "card.json"
    assert main([*command, "--cache", str(cache), "--shard", "1/3"]) == 0
    assert "part 1/3: 7 videos encoded" in capsys.readouterr().out
    assert main([*command, "--cache", str(cache), "--processes", "2", "--out", str(out)]) == 0
    assert read_card(out)["cost"]["videos_encoded"] == 0
    assert len(files_in(cache)) == 20
    assert main([*command, "--cache", str(cache), "--shard", "0/3"]) == 0
    assert "part 0/3: 0 videos encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "0/2"], "--shard needs --cache"),
        (["--shard", "2/2", "--cache", "c"], "--shard: expected I/N"),
        (["--processes", "2"], "--cache DIR"),
    ],
)
def test_wrong_flags(command, more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *more]) == 2
    assert message in capsys.readouterr().err


def test_features_need_no_videos(fixtures, tmp_path, capsys):
    """Three paragraphs of DiDeMo found by embeddings that somebody else computed."""
    folder = fixtures / "annotations" / "didemo"
    rows = json.loads((folder / "test_data.json").read_text())
    names = (folder / "test_list.txt").read_text().split()
    texts = [" ".join(row["description"] for row in rows if row["video"] == name) for name in names]
    np.savez(
        tmp_path / "mine.npz",
        video_embeddings=np.eye(3, dtype=np.float32),
        video_ids=np.asarray(names),
        text_embeddings=np.eye(3, dtype=np.float32)[[0, 2, 1]],
        texts=np.asarray(texts),
        num_frames=12,
    )
    out = tmp_path / "card.json"
    asked = ["eval", "retrieval", "--protocol", "didemo", "--annotations", str(folder), "--out", str(out)]
    asked += ["--model", str(tmp_path / "mine.npz"), "--set", "recall_at=[1,3]"]
    arguments = [*asked, "--set", "expected=null"]
    assert main(arguments) == 0
    card = read_card(out)
    assert card["results"]["query_to_item"]["itc"]["recall@1"]["value"] == pytest.approx(1 / 3)
    assert card["data"]["annotation_files"].keys() == {"test_data.json", "test_list.txt"}
    shown = capsys.readouterr().out
    assert "published: VideoMamba-M 25M" in shown
    assert "input unlike that of the published numbers: frames: 12 instead of 8" in shown
    assert "whether queries were cut is not known" in shown
    assert main(asked) == 4
    assert "expected 1004, found 3" in capsys.readouterr().err
