"""Long videos: within their bounds, frozen, and what is said of a stretch is what it shows."""

import json

import numpy as np
import pytest
import yaml

from vlm.assets import asset
from vlm.cli import main
from vlm.data.decoding import open_video
from vlm.errors import InvalidInput
from vlm.world import caption, facts, is_true, render
from vlm.world.chapters import sample_long, write_long
from vlm.world.chapters.videos import draw, moments_hash, moments_of


@pytest.fixture(scope="module")
def videos():
    return [sample_long(0, index) for index in range(20)]


def test_they_are_the_frozen_ones(videos):
    protocol = yaml.safe_load(asset("eval/protocols/moments/world-long.yaml").read_text())
    assert moments_hash(videos) == protocol["freeze"]["moments"]
    assert protocol["expected"] == {"moments": sum(len(video.chapters) for video in videos), "videos": 20}


def test_length_and_events_keep_to_their_bounds(videos):
    for video in videos:
        assert 60 <= video.num_frames / 8 <= 300
        assert 10 <= video.num_events <= 40
    assert len({video.num_frames for video in videos}) > 15
    with pytest.raises(ValueError, match="seed >= 0"):
        sample_long(0, -1)


def test_a_stretch_shows_its_scene_and_a_pause_stands_still(videos):
    video = min(videos, key=lambda each: each.num_frames)
    frames = draw(video, 64)
    assert len(frames) == video.num_frames
    for scene, start, pause in zip(video.chapters, video.starts, video.pauses, strict=True):
        assert (frames[start : start + 40] == render(scene)).all()
        assert (frames[start + 40 : start + 40 + pause] == frames[start + 39]).all()


def test_windows_are_all_stretches_of_which_the_query_is_true(videos):
    video = videos[0]
    for scene, row in zip(video.chapters, moments_of(video), strict=True):
        true = [
            [start / 8, start / 8 + 5]
            for other, start in zip(video.chapters, video.starts, strict=True)
            if is_true(facts(scene), other)
        ]
        assert (row["relevant_windows"], row["query"]) == (true, caption(scene))
        assert true


def test_from_the_command_to_the_check(tmp_path, capsys):
    out = tmp_path / "long"
    make = ["data", "world", "--split", "long", "--seed", "5", "--count", "1", "--out", str(out)]
    assert main(make) == 0
    (record,) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    with open_video(out / record["file"]) as video:
        assert video.info.num_frames == record["num_frames"]
        assert video.info.duration_s == pytest.approx(record["duration_s"])
    check = ["eval", "check", "world-long", "--annotations", str(out), "--videos", str(out)]
    assert main(check) == 4
    assert "expected 261, found" in capsys.readouterr().err
    assert main([*check, "--set", "expected=null", "--decode"]) == 0
    assert (
        main(
            ["data", "world", "--split", "long", "--seed", "5", "--count", "1", "--twins", "--out", str(out)]
        )
        == 2
    )
    with pytest.raises(InvalidInput, match="other videos"):
        write_long([sample_long(6, 0)], out)
    assert np.diff([chapter["start_s"] for chapter in record["chapters"]]).min() >= 5
