"""A toy model whose scores are known by hand, clips made on the spot, and a build that can be killed.

Run as a program (`python conftest.py INDEX PATH...`) it builds an index with the toy model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 230)
YELLOW, GREY = (210, 210, 20), (120, 120, 120)
COLOURS = {"red": RED, "green": GREEN, "blue": BLUE, "yellow": YELLOW, "grey": GREY}


def write_clip(
    path: Path,
    scenes: Sequence[tuple[tuple[int, int, int], float]],
    *,
    fps: int = 4,
    size: tuple[int, int] = (32, 32),
    tags: dict[str, str] | None = None,
    texture: int | None = None,
) -> Path:
    """Write an mp4 that shows each colour for so many seconds, plain or under the patches of a seed."""
    import av

    generator = np.random.default_rng(texture)

    path.parent.mkdir(parents=True, exist_ok=True)
    # the muxer is named: odd file names must not decide it; and FFmpeg must not read the name as a URL
    with path.open("wb") as file, av.open(file, "w", format="mp4") as container:
        container.metadata.update(tags or {})
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for colour, seconds in scenes:
            pixels = np.full((size[1], size[0], 3), colour, np.uint8)
            if texture is not None:
                patches = (
                    generator.integers(-20, 21, (size[1] // 4, size[0] // 4, 1)).repeat(4, 0).repeat(4, 1)
                )
                pixels = np.clip(pixels + patches, 0, 255).astype(np.uint8)
            for _ in range(round(seconds * fps)):
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                    container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


class ColourEncoder:
    """Embeds a video as its mean colour and a text as the colours it names.

    The matching head reads the strongest single token instead, so that its order differs from the embedding's
    in ways that a test can compute.
    """

    kind, logit_scale = "video-text", None

    def __init__(
        self,
        *,
        name: str = "colours",
        domain: str = "open",
        capabilities: Sequence[str] = ("search", "rerank"),
        fingerprint: str = "colours-1" * 4,
        num_frames: int = 4,
    ) -> None:
        import torch

        from vlm.types import Preprocessing

        self.name, self.domain, self.fingerprint = name, domain, fingerprint
        self.capabilities = frozenset(capabilities)
        self.device = torch.device("cpu")
        self.preprocessing = Preprocessing(
            num_frames=num_frames, image_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )
        self.num_clips = 0

    def encode_video(self, video):
        from vlm.types import VideoFeatures

        self.num_clips += len(video)
        time.sleep(float(os.environ.get("SLOW_S", 0)))
        batch, frames, _, height, width = video.shape
        grid = video.reshape(batch, frames, 3, 4, height // 4, 4, width // 4).mean(dim=(4, 6))
        tokens = grid.permute(0, 1, 3, 4, 2).reshape(batch, frames * 16, 3)
        pooled = video.mean(dim=(3, 4))
        return VideoFeatures(tokens, pooled, pooled.mean(dim=1))

    def encode_text(self, texts):
        import torch

        from vlm.types import TextFeatures

        vectors = torch.tensor([COLOURS.get(text.split()[0], GREY) for text in texts]) / 255.0
        vectors = vectors - vectors.mean(dim=1, keepdim=True)
        return TextFeatures(vectors[:, None], torch.ones(len(texts), 1, dtype=torch.int64), vectors)

    def match(self, video_tokens, text_tokens, mask):
        import torch

        assert mask.shape == text_tokens.shape[:2]
        best = (video_tokens * text_tokens[:, :1]).sum(dim=2).max(dim=1).values
        return torch.stack([-best, best], dim=1)

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in text.split() if word not in COLOURS]


@pytest.fixture(scope="session", name="clip_writer")
def clip_writer_fixture() -> Callable[..., Path]:
    """`write_clip`, for fixtures of the session."""
    return write_clip


@pytest.fixture
def clip() -> Callable[..., Path]:
    """`write_clip`."""
    return write_clip


@pytest.fixture
def colours() -> SimpleNamespace:
    """The colours by name."""
    return SimpleNamespace(**COLOURS)


@pytest.fixture(scope="session")
def make_encoder() -> type[ColourEncoder]:
    """The toy model's class."""
    return ColourEncoder


@pytest.fixture(scope="session")
def real_model():
    """A tiny untrained model of the real kind."""
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel
    from vlm.text import build_tokenizer

    torch.manual_seed(1)
    tokenizer = build_tokenizer(["a red green blue thing"])
    text = TextEncoderConfig(
        vocabulary_size=tokenizer.vocabulary_size, width=16, num_layers=3, fusion_layer=2, num_heads=2,
        intermediate_width=32, max_positions=16, vision_width=16,
    )  # fmt: skip
    vision = VideoMambaConfig(width=16, depth=2, num_frames=4, image_size=32, patch_size=8, state_size=4)
    config = VideoTextConfig(vision=vision, text=text, embedding_width=8)
    return VideoTextModel(config, tokenizer=tokenizer, name="tiny").eval()


@pytest.fixture(scope="session")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three videos; `rgb.mp4` shows red, green and blue for 8 s each."""
    folder = tmp_path_factory.mktemp("movies")
    write_clip(folder / "rgb.mp4", [(RED, 8), (GREEN, 8), (BLUE, 8)])
    write_clip(folder / "grey.mp4", [(GREY, 6)])
    write_clip(folder / "deep" / "yellow.mp4", [(GREY, 8), (YELLOW, 8)])
    return folder


@pytest.fixture(scope="session")
def built(movies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `movies`; tests must not change it."""
    from vlm.retrieval import VideoIndex

    folder = tmp_path_factory.mktemp("built") / "index"
    model = ColourEncoder()
    report = VideoIndex.create(folder, model).add([movies], model=model)
    assert (report.num_added, report.num_segments, report.rejected) == (3, 9, ())
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return, for each video of an index, the hash of its segments' times, vectors and tokens."""
    from vlm.retrieval import VideoIndex
    from vlm.retrieval.vector_log import LogVectors

    index = VideoIndex.open(folder)
    vectors = LogVectors(index.log, index.files(), index.manifest.features.dim)
    snapshot, result = index.snapshot, {}
    for position, video in enumerate(snapshot.videos):
        rows = np.flatnonzero(snapshot.row_video == position)
        rows = rows[np.argsort(snapshot.row_bounds[rows, 0])]
        digest = hashlib.sha256(snapshot.row_bounds[rows].tobytes() + vectors.gather(rows).tobytes())
        for row in rows.tolist():
            part, inner = snapshot.locate(row)
            digest.update(index.log.tokens(part, [inner], quantised=True).restore().tobytes())
        assert video.video_id not in result
        assert len(rows) == video.num_segments
        result[video.video_id] = digest.hexdigest()
    return result


@pytest.fixture(scope="session", name="contents")
def contents_fixture() -> Callable[[Path], dict[str, str]]:
    """`contents`."""
    return contents


@pytest.fixture(scope="session")
def soak(root: Path) -> ModuleType:
    """The soak program as a module: made-up videos, their decoder and encoder, what an index must hold."""
    specification = importlib.util.spec_from_file_location("soak_index", root / "tests" / "soak" / "index.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def call_vlm(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process with the toy model; return its exit code, output and messages."""
    from vlm.cli import main as vlm_main

    monkeypatch.setattr("vlm.cli.index.load", lambda source: (ColourEncoder(), source))

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = vlm_main(words)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def build_command(root: Path) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """Give the command and environment that build an index in another process; see `main`."""

    def compose(index: Path, *paths: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, __file__, str(index), *map(str, paths)]
        return command, {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}

    return compose


@pytest.fixture(scope="session")
def build_process(build_command) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run such builds to their ends, each in a process of its own.

    They are forked from one that has imported everything and done nothing: a start then costs no seconds.
    """
    command, variables = build_command(Path("--serve"))
    server = subprocess.Popen(
        command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(index: Path, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        arguments = [str(index), *map(str, paths)]
        server.stdin.write(json.dumps([arguments, environment]) + "\n")
        server.stdin.flush()
        code, output, errors = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, output, errors)

    yield run
    server.stdin.close()
    assert server.wait(timeout=10) == 0
    server.stdout.close()


def serve() -> int:
    """Fork a build for every line of standard input; answer with its exit code and output."""
    import torch  # noqa: F401

    import vlm.cli.index
    import vlm.retrieval.index  # noqa: F401

    for line in sys.stdin:
        arguments, environment = json.loads(line)
        pipes = [os.pipe(), os.pipe()]
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            os.dup2(pipes[0][1], 1)
            os.dup2(pipes[1][1], 2)
            code = main(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        outputs = []
        for reader, writer in pipes:
            os.close(writer)
            with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
                outputs.append(stream.read())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps([code, *outputs]) + "\n")
        sys.stdout.flush()
    return 0


def main(arguments: list[str]) -> int:
    """Build an index through the command line, with the toy model in the place of a real one.

    In the environment, `FILE_SIZE` limits the size of files, `PART_SEGMENTS` makes commits more frequent,
    `SLOW_S` makes the model slow, and `KILL_AFTER_S` ends it all. `COMMAND` is another command to run.
    """
    import resource

    from vlm.cli import index as command
    from vlm.cli import main as vlm_main

    if delay := os.environ.get("KILL_AFTER_S"):
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
    if size := os.environ.get("FILE_SIZE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    # vlm.retrieval.ingest.run by its module name: the package offers no such attribute before its import
    run = importlib.import_module("vlm.retrieval.ingest.run")
    run.PART_SEGMENTS = int(os.environ.get("PART_SEGMENTS", run.PART_SEGMENTS))
    command.load = lambda source: (ColourEncoder(), source)
    index, *paths = arguments
    if words := os.environ.get("COMMAND"):
        return vlm_main(words.split())
    return vlm_main(["index", "build", *paths, "--out", index, "--model", "colours", "--json"])


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "--serve" else main(sys.argv[1:]))
