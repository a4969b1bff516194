"""``vlm data world``: files and manifest, resumed after an interruption, never mixed with other clips."""

import hashlib
import json
import subprocess
import sys

import av
import numpy as np
import pytest

from vlm.assets import asset
from vlm.errors import InvalidInput
from vlm.world import Scene, render, sample_scene
from vlm.world.clips import read_manifest, write_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "clips"
    command = [
        sys.executable,
        str(asset("data_tools/world.py")),
        "--split",
        "test",
        "--seed",
        "3",
        "--count",
        "4",
    ]
    done = subprocess.run(
        [*command, "--twins", "--out", str(out)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(out / "manifest.jsonl")
    return out


def records(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_files_are_what_the_manifest_says(folder):
    found = records(folder)
    assert len(found) == 8
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    for record, twin in zip(found[::2], found[1::2], strict=True):
        assert record["twin_id"] == twin["id"] and twin["twin_id"] == record["id"]
    for record in found:
        path = folder / record["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[record["file"]]
        scene = Scene.from_json(json.dumps(record["scene"]))
        pixels = render(scene)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == record["frames_sha256"]
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert float(stream.average_rate) == record["fps"] == 8
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert decoded.shape == (record["num_frames"], 64, 64, 3)
        assert np.abs(decoded.astype(int) - pixels).mean() < 3
        assert record["caption"] and record["questions"] and record["objects"] and record["events"]
        for question in record["questions"]:
            assert question["options"][question["answer_index"]] == question["answer"]
    assert {path.name for path in folder.iterdir()} == {r["file"] for r in found} | {
        "manifest.jsonl", "SHA256SUMS", "world.json"
    }  # fmt: skip


def test_the_manifest_gives_the_scenes_back(folder):
    scenes = read_manifest(folder / "manifest.jsonl")
    assert [scene.clip_id for scene in scenes] == [record["id"] for record in records(folder)]
    assert scenes[0] == sample_scene("test", 3, scenes[0].index)


def test_an_interrupted_run_goes_on_and_damage_is_repaired(tmp_path, monkeypatch):
    scenes = [sample_scene("val", 0, index) for index in range(4)]
    from vlm.world import clips

    real, written = clips.encode, []

    def failing(frames, target, codec):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(target.name)
        real(frames, target, codec)

    monkeypatch.setattr(clips, "encode", failing)
    with pytest.raises(OSError, match="No space"):
        write_clips(scenes, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    written.clear()
    monkeypatch.setattr(clips, "encode", lambda *given: (written.append(given[1].name), real(*given)))
    manifest = write_clips(scenes, tmp_path / "out").read_text()
    assert written == [f"{scene.clip_id}.mp4" for scene in scenes[2:]]
    (tmp_path / "out" / written[0]).write_bytes(b"torn")
    written.clear()
    assert write_clips(scenes, tmp_path / "out").read_text() == manifest
    assert written == [f"{scenes[2].clip_id}.mp4"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    scenes = [sample_scene("val", 0, index) for index in range(2)]
    write_clips(scenes[:1], tmp_path / "one")
    before = (tmp_path / "one" / "manifest.jsonl").read_bytes()
    with pytest.raises(InvalidInput, match="other clips"):
        write_clips(scenes, tmp_path / "one")
    with pytest.raises(InvalidInput, match="other clips"):
        write_clips(scenes[:1], tmp_path / "one", size=128)
    assert (tmp_path / "one" / "manifest.jsonl").read_bytes() == before
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "letter.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="not empty"):
        write_clips(scenes, tmp_path / "two")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"version": "world-v0", "scene": {}}'])
def test_a_foreign_manifest_is_an_error(tmp_path, text):
    path = tmp_path / "manifest.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(InvalidInput, match="line 1: expected a record of world-v1"):
        read_manifest(path)


@pytest.mark.parametrize(
    "wrong", [["--split", "tset"], ["--count", "0"], ["--seed", "-1"], ["--count", "x"], ["--size", "65"]]
)
def test_wrong_flags_exit_with_two(tmp_path, wrong):
    right = {"--split": "val", "--seed": "0", "--count": "1", "--out": str(tmp_path / "out")}
    words = [part for pair in {**right, wrong[0]: wrong[1]}.items() for part in pair]
    done = subprocess.run(
        [sys.executable, str(asset("data_tools/world.py")), *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and wrong[0] in done.stderr
    assert not (tmp_path / "out").exists()
