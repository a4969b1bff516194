"""A run so small that a step takes milliseconds, and a way to run it in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "name": "tiny",
    "domain": "digit-world",
    "tokenizer": "world",
    "model": {
        "embedding_width": 16,
        "vision": {"width": 32, "depth": 2, "num_frames": 8, "image_size": 64, "patch_size": 32},
        "text": {
            "width": 32,
            "num_layers": 2,
            "fusion_layer": 1,
            "num_heads": 2,
            "intermediate_width": 64,
            "max_positions": 64,
            "vision_width": 32,
            "dropout": 0.0,
            "has_language_head": True,
        },
    },
    "data": {"workers": 0, "world": {"grouped": 0.5, "group_size": 4}},
    "losses": {"matching": {"num_siblings": 1}, "masked_language": {"weight": 0.2}},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2, "decay_steps": 40, "ema_decay": 0.9},
    "train": {"max_steps": 6, "batch_size": 8, "device": "cpu"},
    "evaluation": {"every": 2, "clips": 4},
    "checkpoint": {"every": 2, "keep": 2},
}


@pytest.fixture(scope="session")
def settings():
    """What the tiny runs' file holds."""
    return TINY


@pytest.fixture
def tiny(tmp_path):
    """Return a function that gives the tiny ``TrainingConfig`` with ``--set`` overrides."""
    from vlm.config import load_config
    from vlm.training.config import TrainingConfig

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")

    def make(*overrides: str) -> TrainingConfig:
        return load_config(TrainingConfig, path, overrides)

    make.path = path
    return make


@pytest.fixture
def make_shards(tmp_path):
    """Return a function that packs the first clips of the digit world and gives the folder."""
    from vlm.data.annotations import Annotation
    from vlm.data.packing import pack
    from vlm.world import caption, sample_scene
    from vlm.world.clips import write_clips

    def make(count: int) -> Path:
        scenes = [sample_scene("train", 0, index) for index in range(count)]
        write_clips(scenes, tmp_path / "clips")
        rows = [Annotation(video=f"{s.clip_id}.mp4", captions=(caption(s),), metadata={}) for s in scenes]
        pack(rows, tmp_path / "clips", tmp_path / "shards")
        return tmp_path / "shards"

    return make


@pytest.fixture
def launch():
    """Return a function that starts ``vlm`` (or with ``processes`` torchrun) and gives the Popen object."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command += [f"--max-restarts={restarts}", "-m"]
        process = subprocess.Popen(
            [*command, "vlm", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Return ``run(text, *arguments, processes)``: Python text in processes that find each other."""
    folder = tmp_path_factory.mktemp("ranks")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ranks.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    questions, answers = server.stdin, server.stdout

    def run(text: str, *arguments: object, processes: int) -> None:
        script, output = folder / "script.py", folder / "output.txt"
        script.write_text(text)
        output.unlink(missing_ok=True)
        job = {"command": [str(script), *map(str, arguments)], "processes": processes, "output": str(output)}
        questions.write(f"{json.dumps(job)}\n")
        questions.flush()
        codes = json.loads(answers.readline())
        assert codes == [0] * processes, output.read_text()

    yield run
    server.communicate()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return the folder of a whole tiny run, to compare others with."""
    from vlm.config import build
    from vlm.training.config import TrainingConfig
    from vlm.training.loop import train

    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(build(TrainingConfig, TINY), run)
    return run


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Six clips, five clips and seven pictures, packed; each set calls its own 0, 1, 2, ..."""
    from PIL import Image

    from vlm.data.annotations import Annotation, read_folder
    from vlm.data.packing import pack
    from vlm.world import caption, render, sample_scene
    from vlm.world.clips import write_clips

    folder = tmp_path_factory.mktemp("sets")
    for name, numbers in (("many", range(6)), ("few", range(6, 11))):
        scenes = [sample_scene("train", 0, number) for number in numbers]
        clips = folder / f"{name}-clips"
        write_clips(scenes, clips)
        rows = []
        for number, scene in enumerate(scenes):
            (clips / f"{scene.clip_id}.mp4").rename(clips / f"{number}.mp4")
            rows.append(Annotation(video=f"{number}.mp4", captions=(caption(scene),)))
        pack(rows, clips, folder / name)
    album = folder / "album"
    album.mkdir()
    for number in range(7):
        scene = sample_scene("train", 0, 20 + number)
        Image.fromarray(render(scene, [5 * number])[0]).save(album / f"{number}.png")
        (album / f"{number}.txt").write_text(caption(scene))
    pack(read_folder(album, "image"), album, folder / "pictures", media="image")
    return folder


@pytest.fixture
def mixed(sets, tiny):
    """Return a function that gives the config of a run on the three sets."""
    corpora = {
        "pictures": {"folders": [str(sets / "pictures")], "media": "image", "batch_size": 6},
        "many": {"folders": [str(sets / "many")]},
        "few": {"folders": [str(sets / "few")], "batch_size": 2, "weight": 1.5},
    }
    settings = {"source": "shards", "workers": 0, "shards": {"corpora": corpora, "random_frames": False}}
    values = yaml.safe_load(tiny.path.read_text()) | {"data": settings}
    values["train"] |= {"max_steps": 10, "batch_size": 4}
    values["losses"]["matching"] = {}
    values["evaluation"] = {"every": 0}
    tiny.path.write_text(yaml.safe_dump(values))
    return tiny
