"""Videos to embed by tasks, and all that a user can see of an index, to compare with a local build."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.retrieval import VideoIndex

State = dict[str, object]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, clip_writer) -> Path:
    """Seven videos, of which two are copies, and a broken file."""
    folder = tmp_path_factory.mktemp("shelf")
    for number in range(6):
        colour = (30 * number + 20, 200 - 30 * number, 90)
        clip_writer(folder / f"{number}.mp4", [(colour, 5 + number), ((200, 90, 20 * number), 4)])
    shutil.copy(folder / "2.mp4", folder / "a-copy.mp4")
    (folder / "broken.mp4").write_text("broken")
    return folder


@pytest.fixture
def films(shelf, tmp_path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(shelf, tmp_path / "films"))


@pytest.fixture(scope="session")
def state(contents) -> Callable[[Path], State]:
    """Give names, vectors, times, rejections, and what was asked for."""

    def read(folder: Path) -> State:
        index = VideoIndex.open(folder)
        info = index.info()
        with index.held() as catalog:
            roots, seen = list(catalog.roots()), catalog.seen()
        videos = index.snapshot.videos
        assert index.verify() == []
        return {
            "contents": contents(folder),
            "paths": {v.video_id: (v.path, v.sha256, v.duration_s, v.domain, v.tags) for v in videos},
            "rejected": info["rejected"],
            "counts": (info["num_videos"], info["num_segments"], info["num_rejected"]),
            "roots": roots,
            "seen": seen,
        }

    return read


@pytest.fixture
def local(state, make_encoder) -> Callable[..., State]:
    """Build an index locally; return what it holds."""

    def build(folder: Path, paths: list[Path], model=None, **options) -> State:
        model = model or make_encoder()
        VideoIndex.create(folder, model).add(paths, model=model, **options)
        return state(folder)

    return build


@pytest.fixture(scope="session")
def saved_model(real_model, tmp_path_factory) -> Path:
    """The folder of a tiny untrained model of the real kind, for programs of their own."""
    from vlm.models.weights.folder import save_model

    return save_model(real_model, tmp_path_factory.mktemp("models") / "tiny")
