"""A classifier so small that a step takes milliseconds, on clips of the world and on painted video files."""

from __future__ import annotations

import av
import numpy as np
import pytest
import yaml

TINY = {
    "name": "tiny",
    "domain": "digit-world",
    "model": {
        "vision": {"width": 32, "depth": 2, "num_frames": 8, "image_size": 64, "patch_size": 32},
        "text": {"vision_width": 32},
    },
    "data": {"workers": 0},
    "classification": {
        "world": {"label": "action"},
        "mixing": {"mixup": 0.8, "cutmix": 1.0},
    },
    "optimizer": {
        "learning_rate": 2e-3, "warmup_steps": 2, "decay_steps": 40, "layer_decay": 0.8, "ema_decay": 0.9,
    },
    "train": {"max_steps": 6, "batch_size": 8, "device": "cpu"},
    "evaluation": {"every": 2, "clips": 9, "best": "top1"},
    "checkpoint": {"every": 2, "keep": 2},
}  # fmt: skip


def make_config(path, *overrides):
    from vlm.config import load_config
    from vlm.training.config import TrainingConfig

    return load_config(TrainingConfig, path, overrides)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {**TINY, "model": {**TINY["model"], "vision": {**TINY["model"]["vision"], "drop_path": 0.2}}}
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def tiny(tiny_path):
    """Return a function that gives the tiny ``TrainingConfig`` with ``--set`` overrides."""

    def make(*overrides):
        return make_config(tiny_path, *overrides)

    make.path = tiny_path
    return make


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of twelve short videos, three of each of four shades, and their labels in two files."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for number in range(12):
        shade = number % 4
        with av.open(str(folder / f"v {number:02d}.mp4"), "w") as output:
            stream = output.add_stream("libx264", rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in range(10 + number):
                pixels = np.full((64, 64, 3), 30 + 60 * shade, np.uint8)
                pixels[:, : 4 + 4 * (frame % 10)] = 255
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            output.mux(stream.encode(None))
        lines.append(f"v {number:02d}.mp4,{shade}\n")
    (folder / "train.csv").write_text("".join(lines[:8]), encoding="utf-8")
    (folder / "val.csv").write_text("".join(lines[8:]), encoding="utf-8")
    (folder / "classes.txt").write_text("black\ndark\ngrey\nbright\n", encoding="utf-8")
    return folder


@pytest.fixture
def files(clips, tiny):
    """Return a function that gives a config that reads the videos of ``clips``."""
    settings = {
        "source": "files",
        "files": {
            "train": str(clips / "train.csv"),
            "val": str(clips / "val.csv"),
            "classes": str(clips / "classes.txt"),
            "videos": str(clips),
            "repeats": 2,
            "augmentation": {"min_scale": 0.3, "flip": 0.5, "operations": 2, "erase": 0.25},
        },
    }

    def make(*overrides):
        return tiny(f"classification={yaml.safe_dump(settings, default_flow_style=True)}", *overrides)

    return make
