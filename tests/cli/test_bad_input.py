"""What users hand over by mistake or malice: the exit code, the reason given, and that nothing good is lost.

Here is what `test_index_search.py`, `test_train.py` and `tests/data_tools` do not walk from end to end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from vlm.cli import main

RED, BLUE = (200, 0, 0), (0, 0, 200)
SIZES = {"width": 16, "num_layers": 2, "fusion_layer": 1, "num_heads": 2, "intermediate_width": 16}


def write_clip(path: Path, colour: tuple[int, int, int] = RED, seconds: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 32, 32, "yuv420p", 1
        frame = np.full((32, 32, 3), colour, np.uint8)
        for _ in range(seconds * 4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])


def write_bomb(path: Path) -> None:
    """8192x8192 black pixels in a few kilobytes, larger than any camera's frame."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5, options={"preset": "ultrafast"})
        stream.width = stream.height = 8192
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(8192, 8192, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert path.stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Save a tiny untrained model; return its folder."""
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
    from vlm.text import build_tokenizer

    def make(name: str, seed: int) -> str:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(["a red thing"])
        text = TextEncoderConfig(
            vocabulary_size=tokenizer.vocabulary_size, vision_width=16, max_positions=16, **SIZES
        )
        vision = VideoMambaConfig(width=16, depth=1, num_frames=2, image_size=32, patch_size=8, state_size=4)
        config = VideoTextConfig(vision=vision, text=text, embedding_width=8)
        folder = tmp_path_factory.mktemp("models") / name
        save_model(VideoTextModel(config, tokenizer=tokenizer, name=name), folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def model(make_model) -> str:
    return make_model("tiny", 0)


@pytest.fixture(scope="module")
def whole_index(tmp_path_factory, model) -> Path:
    """An index of two videos; tests work on copies."""
    folder = tmp_path_factory.mktemp("whole")
    write_clip(folder / "v" / "red.mp4", RED, 12)
    write_clip(folder / "v" / "blue.mp4", BLUE, 3)
    assert main(["index", "build", str(folder / "v"), "--out", str(folder / "i"), "--model", model]) == 0
    return folder / "i"


@pytest.fixture
def index(whole_index, tmp_path) -> str:
    return str(shutil.copytree(whole_index, tmp_path / "copy"))


@pytest.fixture
def ask(capsys):
    """Run a command that ends with 0 and prints JSON; return what it printed."""

    def run(*words: str):
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_bad_files_beside_a_good_one_are_listed_with_their_reasons(tmp_path, model, ask, capsys) -> None:
    folder, out = tmp_path / "v", str(tmp_path / "i")
    good = write_clip(folder / "good.mp4", RED, 3)
    (folder / "zero.mp4").touch()
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (folder / "torn.mp4").write_bytes(good.read_bytes()[:300])
    write_sound(folder / "sound.mp4")
    write_bomb(folder / "bomb.mp4")
    reasons = {"bomb.mp4": "too_large", "sound.mp4": "audio_only", "zero.mp4": "empty"}
    reasons |= {"noise.mp4": "not_a_video", "torn.mp4": "not_a_video"}
    shutil.copy(folder / "noise.mp4", folder / "forbidden.mp4")
    (folder / "forbidden.mp4").chmod(0)
    is_root = os.access(folder / "forbidden.mp4", os.R_OK)  # to whom nothing is forbidden
    reasons["forbidden.mp4"] = "not_a_video" if is_root else "unreadable"
    # a bomb that takes its time would be a "timeout" instead
    command = ["index", "build", str(folder), "--out", out, "--model", model, "--timeout", "10"]
    assert main(command) == 3
    printed = capsys.readouterr().out
    assert f"1 added, 0 updated, 0 renamed, 0 unchanged, 0 removed, {len(reasons)} rejected" in printed
    for name, reason in reasons.items():
        assert f"rejected ({reason}): {folder / name}" in printed
    info = ask("index", "info", out)
    assert (info["num_videos"], info["num_rejected"]) == (1, len(reasons))
    listed = {entry["path"]: entry["reason"] for entry in info["rejected"]}
    assert listed == {str(folder / name): reason for name, reason in reasons.items()}
    assert all(entry["detail"].startswith(entry["path"]) for entry in info["rejected"])
    assert [hit["path"] for hit in ask("search", out, "a red thing")] == [str(good)]


def test_bad_files_alone_are_nothing_usable(tmp_path, model, ask, capsys) -> None:
    (tmp_path / "v").mkdir()
    write_sound(tmp_path / "v" / "sound.mp4")
    (tmp_path / "v" / "zero.mp4").touch()
    out = str(tmp_path / "i")
    assert main(["index", "build", str(tmp_path / "v"), "--out", out, "--model", model]) == 4
    message = capsys.readouterr().err
    assert f"none of 2 files is a usable video; the first: {tmp_path}/v/sound.mp4" in message
    info = ask("index", "info", out)
    assert (info["num_videos"], info["num_rejected"]) == (0, 2)


def test_hurtful_names_come_back_as_they_are(tmp_path, model, ask, capsys, monkeypatch) -> None:
    names = ['it\'s "quoted".mp4', "new\nline.mp4", "-dash.mp4", "--json.mp4", "--debug", "\x1b[2Jclear.mp4"]
    for name in names:
        write_clip(tmp_path / "v" / name)
    out = str(tmp_path / "i")
    monkeypatch.chdir(tmp_path / "v")
    assert main(["index", "build", "--out", out, "--model", model, "--", *names]) == 0
    assert f"{len(names)} added" in capsys.readouterr().out
    hits = ask("search", out, "a red thing")
    assert sorted(hit["path"] for hit in hits) == sorted(str(tmp_path / "v" / name) for name in names)
    assert main(["search", out, "a red thing"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(names) and "\x1b" not in printed
    found = ask("search", out, "a red thing", "--where", "path like '%new\nline%'")
    assert [hit["path"] for hit in found] == [str(tmp_path / "v" / "new\nline.mp4")]
    assert main(["index", "remove", out, "--", *names[2:]]) == 0
    assert {Path(hit["path"]).name for hit in ask("search", out, "red")} == set(names[:2])


@pytest.fixture
def sprung(tmp_path) -> Iterator[threading.Event]:
    """An event that is set as soon as anybody opens the named pipe `v/trap.bin` for reading."""
    path, event = tmp_path / "v" / "trap.bin", threading.Event()
    path.parent.mkdir()
    os.mkfifo(path)

    def wait() -> None:
        with suppress(OSError), path.open("wb"):  # opens only when a reader does
            event.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield event
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    thread.join(timeout=10)


def test_a_playlist_named_as_a_video_opens_nothing(tmp_path, model, sprung, ask, capsys, monkeypatch) -> None:
    folder, out = tmp_path / "v", str(tmp_path / "i")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile trap.bin\n")
    monkeypatch.chdir(folder)
    write_clip(folder / "good.mp4")
    assert main(["index", "build", str(folder), "--out", out, "--model", model]) == 3
    assert f"rejected (not_a_video): {folder}/list.mp4" in capsys.readouterr().out
    assert not sprung.is_set()
    assert [entry["path"] for entry in ask("index", "info", out)["rejected"]] == [f"{folder}/list.mp4"]
    assert main(["search", out, "--video", str(folder / "list.mp4")]) == 4
    assert "not a video in a known format" in capsys.readouterr().err
    assert not sprung.is_set()
    # and the trap works: a careless reader falls into it
    with suppress(av.error.FFmpegError):
        av.open(str(folder / "list.mp4")).close()
    assert sprung.wait(timeout=10)


@pytest.fixture
def shards(tmp_path, capsys) -> Path:
    """A packed folder whose only shard was cut in the middle."""
    for number in range(4):
        write_clip(tmp_path / "v" / f"{number}.mp4", (60 * number, 0, 0), 3)
        (tmp_path / "v" / f"{number}.txt").write_text("a circle moves left\n")
    out = tmp_path / "shards"
    assert main(["data", "pack", "--folder", str(tmp_path / "v"), "--out", str(out)]) == 0
    tar = out / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    capsys.readouterr()
    return out


def test_a_torn_shard_is_named(shards, capsys) -> None:
    assert main(["data", "verify", str(shards)]) == 5
    printed = capsys.readouterr().out
    assert "shard-000000.tar: " in printed and "4 samples in 1 shards, 0 findings" not in printed


@pytest.fixture
def tiny_run(tmp_path) -> list[str]:
    """The command of a run with a model that takes milliseconds a step."""
    text = {**SIZES, "max_positions": 64, "vision_width": 16, "has_language_head": False}
    vision = {"width": 16, "depth": 1, "num_frames": 8, "image_size": 64, "patch_size": 32}
    config = {"tokenizer": "world", "model": {"embedding_width": 8, "vision": vision, "text": text}}
    config |= {"data": {"workers": 0}, "train": {"max_steps": 2, "batch_size": 4, "device": "cpu"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return ["train", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]


def test_training_from_a_torn_shard_stops_and_says_how_to_look(shards, tiny_run, tmp_path, capsys) -> None:
    source = [
        "--set",
        "data.source=shards",
        "--set",
        f"data.shards.corpora={{videos: {{folders: [{shards}]}}}}",
    ]
    assert main([*tiny_run, *source]) == 4
    message = capsys.readouterr().err
    assert "of 4 samples cannot be used (short_read" in message and "shard-000000.tar" in message
    assert "run vlm data verify" in message
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_left_samples_out_says_so(shards, tiny_run, tmp_path, capsys) -> None:
    source = [
        f"data.shards.corpora={{videos: {{folders: [{shards}]}}}}",
        "data.source=shards",
        "data.shards.max_bad_fraction=1.0",
    ]
    assert main([*tiny_run, *(word for value in source for word in ("--set", value))]) == 3
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "run" / "model")
    listed = (tmp_path / "run" / "rejected-0.jsonl").read_text().splitlines()
    places = {(row["shard"], row["key"]) for row in map(json.loads, listed)}
    assert f"vlm: {len(places)} samples were rejected; " in printed.err and 0 < len(places) < 4


def test_frames_that_the_world_cannot_show_are_a_wrong_config(tiny_run, tmp_path, capsys) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(file.read_text().replace("num_frames: 8", "num_frames: 2"))
    assert main(tiny_run) == 4
    assert "num_frames" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused_and_the_index_stays(
    index, model, make_model, tmp_path, ask, capsys
) -> None:
    other = make_model("other", 7)
    before = ask("search", index, "a red thing")
    write_clip(tmp_path / "more" / "new.mp4")
    for command in (
        ["search", index, "a red thing", "--model", other],
        ["index", "add", index, str(tmp_path / "more"), "--model", other],
        ["index", "update", index, "--model", other],
        ["index", "build", str(tmp_path / "more"), "--out", index, "--model", other],
    ):
        assert main(command) == 4
        message = capsys.readouterr().err
        assert "was made by model 'tiny'" in message and "the model at hand is 'other'" in message
        assert f"Use --model {model}, or build a new index" in message
    assert main(["index", "verify", index]) == 0
    assert ask("search", index, "a red thing", "--model", model) == before
    assert main(["index", "add", index, str(tmp_path / "more")]) == 0
    assert len(ask("search", index, "a red thing")) == len(before) + 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_index_answering(index, call, tmp_path, ask, capsys, monkeypatch) -> None:
    write_clip(tmp_path / "more" / "new.mp4", (0, 200, 0), 5)
    before = ask("search", index, "a red thing")
    command = ["index", "add", index, str(tmp_path / "more")]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        assert main(command) == 6
    assert "no space left to write it; the index is unchanged" in capsys.readouterr().err
    assert ask("search", index, "a red thing") == before
    assert main(["index", "verify", index]) == 0
    assert not list(Path(index).rglob(".tmp-*"))
    assert main(command) == 0
    assert len(ask("search", index, "a red thing")) == len(before) + 1
