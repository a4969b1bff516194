"""`vlm eval copies`: what it counts, on clips of the digit world."""

import json

from vlm.cli import main
from vlm.world import sample_scene
from vlm.world.clips import write_clips


def test_copies_turned_and_others_are_counted(tmp_path, capsys):
    clips, out = tmp_path / "clips", tmp_path / "copies.json"
    write_clips([sample_scene("test", 5, index) for index in (0, 1, 2, 3)], clips)
    (clips / "broken.mp4").write_bytes(b"no video")
    assert main(["eval", "copies", "--videos", str(clips), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["videos"], found["short_or_broken"]) == (4, 1)
    assert found["copies"]["of"] == found["turned"]["of"] == 4 and found["others"]["of"] == 12
    assert found["copies"]["taken"] == 4 and found["turned"]["taken"] == found["others"]["taken"] == 0
    assert found["copies"]["p90_end_error_s"] < 0.7  # frames lie 0.6 s apart
    assert "4 of 4 copies" in capsys.readouterr().out


def test_two_videos_are_needed(tmp_path, capsys):
    write_clips([sample_scene("test", 5, 0)], tmp_path / "clips")
    assert main(["eval", "copies", "--videos", str(tmp_path / "clips")]) == 4
    assert "expected at least two videos" in capsys.readouterr().err
