"""Decoded segments into vectors, a batch at a time: whole segments, or the frames that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from vlm.retrieval.embedding import FeatureLayout, encode_frames, encode_segments
from vlm.retrieval.ingest.events import DecodedSegment
from vlm.retrieval.vector_log import TokenBlock
from vlm.types import VideoTextEncoder

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Encoded(Generic[Key]):
    """What segments became.

    Attributes:
        keys: Which segments, as they were added.
        vectors: (segments, dim) float16.
        tokens: Their token features, if they are kept.
        num_frames: How many frames were encoded for them.
    """

    keys: list[Key]
    vectors: np.ndarray
    tokens: TokenBlock | None
    num_frames: int


class Batches(Protocol[Key]):
    """Segments that wait to be encoded."""

    @property
    def is_full(self) -> bool:
        """Whether enough wait."""

    def add(self, key: Key, segment: DecodedSegment) -> None:
        """Let a segment wait; those of a file come by number, and no other file's come in between."""

    def encode(self) -> Encoded[Key] | None:
        """Encode all that wait, in the order they came; None if there are none."""


def make_batches(
    model: VideoTextEncoder, layout: FeatureLayout, grid_step_s: float | None, batch_size: int
) -> Batches[Key]:
    """Return an empty batch.

    Args:
        model: The encoder.
        layout: What is kept of a segment.
        grid_step_s: As the segments were decoded: None if each has frames of its own.
        batch_size: Segments encoded at once, or as many frames as they have.
    """
    if grid_step_s is None:
        return _Clips(model, layout, batch_size)
    return _SharedFrames(model, batch_size * model.preprocessing.num_frames)


class _Clips(Generic[Key]):
    """Segments that the model sees whole."""

    def __init__(self, model: VideoTextEncoder, layout: FeatureLayout, batch_size: int) -> None:
        self._model, self._layout, self._batch_size = model, layout, batch_size
        self._keys: list[Key] = []
        self._clips: list[np.ndarray] = []

    @property
    def is_full(self) -> bool:
        return len(self._clips) >= self._batch_size

    def add(self, key: Key, segment: DecodedSegment) -> None:
        self._keys.append(key)
        self._clips.append(segment.video)

    def encode(self) -> Encoded[Key] | None:
        if not self._clips:
            return None
        keys, clips = self._keys, self._clips
        self._keys, self._clips = [], []
        vectors, tokens = encode_segments(self._model, clips, self._layout)
        return Encoded(keys, vectors, tokens, sum(map(len, clips)))


class _SharedFrames(Generic[Key]):
    """Segments as means of frames that are encoded once; vectors are held only while segments may need them.

    Frames are counted over all files, as they come.
    """

    def __init__(self, model: VideoTextEncoder, batch_frames: int) -> None:
        self._model, self._batch_frames = model, batch_frames
        self._keys: list[Key] = []
        self._shown: list[np.ndarray] = []
        self._frames: list[np.ndarray] = []
        self._num_came, self._first_of_file = 0, 0
        # the oldest frame whose vector is held, the vectors from there on, the oldest that is still asked for
        self._first_held, self._oldest = 0, 0
        self._held: np.ndarray | None = None

    @property
    def is_full(self) -> bool:
        # of a picture that stands still, segments come without frames
        return max(len(self._frames), len(self._keys)) >= self._batch_frames

    def add(self, key: Key, segment: DecodedSegment) -> None:
        assert segment.shown is not None
        if segment.number == 0:
            self._first_of_file = self._num_came
        shown = self._first_of_file + segment.shown
        self._frames.extend(segment.video)
        self._num_came += len(segment.video)
        # segments come in the order of their beginnings, so what lies before is never asked for again
        assert self._oldest <= shown[0] and shown[-1] < self._num_came
        self._oldest = int(shown[0])
        self._keys.append(key)
        self._shown.append(shown)

    def encode(self) -> Encoded[Key] | None:
        if not self._keys:
            return None
        keys, shown, frames = self._keys, self._shown, self._frames
        self._keys, self._shown, self._frames = [], [], []
        held = [] if self._held is None else [self._held]
        for start in range(0, len(frames), self._batch_frames):
            held.append(encode_frames(self._model, frames[start : start + self._batch_frames]))
        known = np.concatenate(held)
        means = [known[mine - self._first_held].mean(axis=0) for mine in shown]
        self._held, self._first_held = known[self._oldest - self._first_held :].copy(), self._oldest
        return Encoded(keys, np.stack(means).astype(np.float16), None, len(frames))
