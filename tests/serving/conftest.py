"""A tiny untrained model, an index of small clips in several formats, and that index served in a thread."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

COLOURS = {"red": (210, 20, 20), "green": (20, 190, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}
TOKEN = "a-token-of-thirty-two-characters"


def write_clip(
    path: Path,
    scenes: list[tuple[str, float]],
    *,
    fps: int = 10,
    size: tuple[int, int] = (96, 64),
    container: str = "mp4",
    codec: str = "libx264",
    sound: bool = False,
    keyframe_every: int = 20,
    num_reordered: int = 0,
    pixel_shape: Fraction = Fraction(1),
) -> Path:
    """Write colours, so many seconds each, with a white bar whose height grows through the whole clip."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    total = round(sum(seconds for _, seconds in scenes) * fps)
    with path.open("wb") as file, av.open(file, "w", format=container) as target:
        options = {"crf": "18", "preset": "veryfast", "bf": str(num_reordered)} if codec == "libx264" else {}
        stream = target.add_stream(codec, rate=fps, options={**options, "g": str(keyframe_every)})
        stream.width, stream.height, stream.thread_count = *size, 1
        stream.sample_aspect_ratio = pixel_shape
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        tone = target.add_stream("aac", rate=48000, layout="mono") if sound else None
        number = 0
        for colour, seconds in scenes:
            for _ in range(round(seconds * fps)):
                pixels = np.full((size[1], size[0], 3), COLOURS[colour], np.uint8)
                pixels[: max(1, size[1] * number // total), :8] = 255
                target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
                number += 1
        target.mux(stream.encode(None))
        if tone is not None:
            for start in range(0, int(48000 * total / fps), 1024):
                wave = 0.2 * np.sin(np.arange(start, start + 1024, dtype=np.float32)[None] / 20)
                frame = av.AudioFrame.from_ndarray(wave.astype(np.float32), "fltp", "mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                target.mux(tone.encode(frame))
            target.mux(tone.encode(None))
    return path


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """A running server, asked over real sockets."""

    def __init__(self, address: str, state: Any) -> None:
        self.address, self.state = address, state
        self.host, _, port = address.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Send one request; a dict is sent as JSON."""
        headers = dict(headers or {})
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            names = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, names, reply.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})


@pytest.fixture(scope="session", name="write_clip")
def write_clip_fixture() -> Callable[..., Path]:
    """`write_clip`."""
    return write_clip


@pytest.fixture(scope="session")
def token() -> str:
    return TOKEN


@pytest.fixture(scope="session")
def model_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny untrained model."""
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
    from vlm.text import build_tokenizer

    torch.manual_seed(3)
    tokenizer = build_tokenizer(["a red green blue grey thing moves left or right"])
    text = TextEncoderConfig(
        vocabulary_size=tokenizer.vocabulary_size, width=16, num_layers=2, fusion_layer=1, num_heads=2,
        intermediate_width=16, max_positions=32, vision_width=16,
    )  # fmt: skip
    vision = VideoMambaConfig(width=16, depth=1, num_frames=2, image_size=32, patch_size=8, state_size=4)
    config = VideoTextConfig(vision=vision, text=text, embedding_width=8)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(VideoTextModel(config, tokenizer=tokenizer, name="tiny"), folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(model_source: str) -> Any:
    from vlm.models import load_model

    return load_model(model_source)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips; two of them no browser plays as they are."""
    folder = tmp_path_factory.mktemp("films")
    write_clip(folder / "red then green.mp4", [("red", 10), ("green", 10)])
    write_clip(folder / "blue.mp4", [("blue", 6)], size=(64, 96))
    write_clip(folder / "grey.mp4", [("grey", 3)], sound=True)
    write_clip(
        folder / "copied.mkv", [("green", 6), ("red", 6)], container="matroska", sound=True, num_reordered=3
    )
    write_clip(folder / "old.avi", [("blue", 6), ("red", 4)], container="avi", codec="mpeg4")
    write_clip(folder / "<img src=x onerror=document.title='owned'>.mp4", [("green", 2)])
    return folder


@pytest.fixture(scope="session")
def index(films: Path, model: Any, model_source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `films`; tests must not change it."""
    from vlm.retrieval import VideoIndex

    folder = tmp_path_factory.mktemp("served") / "index"
    made = VideoIndex.create(folder, model, source=model_source)
    assert made.add([films], model=model).num_added == 6
    return folder


@pytest.fixture(scope="session")
def serving(model: Any, model_source: str) -> Callable[..., Any]:
    """A context in which an index is served, with some settings."""
    from vlm.serving.server import Server, listen
    from vlm.serving.settings import ServeSettings
    from vlm.serving.state import open_state

    usual = model

    @contextmanager
    def run(
        index: Path | str, cache: Path, model: Any = usual, backend: str = "auto", **settings: Any
    ) -> Iterator[Site]:
        wanted = ServeSettings(port=0, cache_folder=cache, **settings)
        state = open_state(index, model, model_source, wanted, backend)
        addresses: list[str] = []
        with listen(wanted.host, wanted.port) as listener:
            server = Server(state, listener, addresses.append)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                end = time.monotonic() + 30
                while not addresses and thread.is_alive() and time.monotonic() < end:
                    time.sleep(0.01)
                yield Site(addresses[0], state)
            finally:
                server.should_exit = True
                thread.join(30)
                state.close()
        assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def site(
    index: Path, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """`index`, served; tests must not change it."""
    with serving(index, tmp_path_factory.mktemp("cache")) as running:
        yield running


@pytest.fixture(scope="session")
def ids(index: Path) -> dict[str, str]:
    """The identifier of each clip, by the first word of its name."""
    import os

    from vlm.retrieval import VideoIndex

    videos = VideoIndex.open(index).snapshot.videos
    return {Path(os.fsdecode(v.path)).name.replace(".", " ").split()[0]: v.video_id for v in videos}
