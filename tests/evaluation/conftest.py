"""A small world in memory, and models whose results on it are known beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm import world
from vlm.data import preprocess
from vlm.errors import DataError
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.protocol import BootstrapSettings, Protocol
from vlm.metrics import Positives
from vlm.types import Answer, Preprocessing, TextFeatures, VideoFeatures

NUM_PAIRS = 10


class Toy:
    """A model that recognises clips by their exact frames and captions by their exact words.

    ``sees`` decides what of a clip it can tell apart: the frames in order, the bag of them, or nothing.
    """

    kind, domain, logit_scale = "video-text", "digit-world", None
    preprocessing = Preprocessing(num_frames=8, image_size=64)
    device = torch.device("cpu")

    def __init__(self, clips, truth, queries, sees="order", head=None, capabilities=("search", "rerank")):
        self.name = f"toy-{sees}" + (f"-{head}" if head else "")
        self.capabilities = frozenset(capabilities)
        self.fingerprint = hashlib.sha256(self.name.encode()).hexdigest()
        self.sees, self.head = sees, head or sees
        self.truth = torch.as_tensor(truth, dtype=torch.float32)
        self.row = {text: number for number, text in enumerate(queries)}
        self.tables = {
            kind: [self._key(clip, kind) for clip in clips] for kind in {"order", "bag", self.sees, self.head}
        }
        self.pairs_scored, self.largest_batch = 0, 0

    @staticmethod
    def _key(clip, sees):
        frames = [frame.numpy().tobytes() for frame in clip]
        if sees == "bag":
            frames.sort()
        return hashlib.sha256(b"".join(frames) if sees in ("order", "bag") else b"").hexdigest()

    def _see(self, clip, sees):
        """One-hot over all clips that look the same; zero for a clip never seen."""
        key = self._key(clip, sees)
        same = torch.tensor([float(other == key) for other in self.tables[sees]])
        return same / same.sum().clamp(min=1)

    def encode_video(self, video):
        assert video.shape[1:] == (8, 3, 64, 64)
        self.largest_batch = max(self.largest_batch, len(video))
        embedding = torch.stack([self._see(clip, self.sees) for clip in video])
        tokens = torch.stack([self._see(clip, self.head) for clip in video])
        return VideoFeatures(tokens[:, None], embedding[:, None], embedding)

    def encode_text(self, texts):
        embedding = torch.stack([self.truth[self.row[text]] for text in texts])
        longest = max(len(text.split()) for text in texts)
        tokens = torch.zeros(len(texts), longest, embedding.shape[1])
        tokens[:, 0] = embedding
        mask = torch.tensor([[int(i < len(text.split())) for i in range(longest)] for text in texts])
        return TextFeatures(tokens, mask, embedding)

    def match(self, video_tokens, text_tokens, mask):
        assert len(video_tokens) == len(text_tokens) == len(mask)
        self.pairs_scored += len(mask)
        right = (video_tokens[:, 0] * text_tokens[:, 0]).sum(-1)
        return torch.stack([-right, right], dim=1)

    def unknown_words(self, text):
        return [word for word in text.split() if word == "dog"]

    def answer(self, video, questions, candidates=None):
        return [Answer(text=options[0], score=0.0) for options in candidates]


@pytest.fixture(scope="session")
def scenes():
    return list(world.gallery("val", 3, NUM_PAIRS, twins=True))


@pytest.fixture(scope="session")
def clips(scenes):
    frames = [world.render(scene, world.sample_frames(8)) for scene in scenes]
    return [preprocess(clip, Toy.preprocessing) for clip in frames]


@pytest.fixture(scope="session")
def data(scenes):
    items = np.arange(len(scenes))
    return EvaluationSet(
        clip_ids=tuple(scene.clip_id for scene in scenes),
        paths=tuple(Path(str(number)) for number in items),
        queries=tuple(world.caption(scene) for scene in scenes),
        query_clip=items,
        positives=Positives.from_matrix(world.truth_matrix(scenes, scenes)),
        groups=items // 2,
        twin_of=items ^ 1,
        tiers=tuple("one thing" if len(scene.things) == 1 else "several" for scene in scenes),
        annotations_sha256="0" * 64,
    )


@pytest.fixture
def on_disk(data, tmp_path):
    """The gallery with files whose names tell the clip and whose bytes differ."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in data.paths:
        (folder / path.name).write_text(f"clip {path.name}")
    return dataclasses.replace(data, paths=tuple(folder / path.name for path in data.paths))


@pytest.fixture
def load(clips):
    def load_clip(path, _preprocessing):
        if path.name not in {str(number) for number in range(len(clips))}:
            raise DataError(f"{path}: no such file", "missing")
        return clips[int(path.name)]

    return load_clip


@pytest.fixture
def protocol():
    return Protocol(
        name="toy",
        version=1,
        summary="twenty clips",
        layout="world",
        rerank_k=6,
        bootstrap=BootstrapSettings(resamples=100),
    )


@pytest.fixture
def toy(clips, scenes, data):
    truth = world.truth_matrix(scenes, scenes)
    return lambda *arguments, **named: Toy(clips, truth, data.queries, *arguments, **named)
