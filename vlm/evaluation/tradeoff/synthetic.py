"""Made-up segment vectors and text queries on which an approximate search has something to lose.

What makes real embeddings hard to compress and to partition is kept: a slowly falling spectrum (some 80
effective dimensions of 512, none empty), topics of very unequal size that overlap, runs of near-duplicates
(the segments of one video), a mean that all vectors share, and queries from another tower: about a stored
video, but with another mean and far from every stored vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BLOCK_ROWS = 16_000
SEGMENTS_PER_VIDEO = 20
_NUM_TOPICS = 2000
# standard deviations, in units of a topic's own spread
_SCENE, _SEGMENT, _TEXT_DETAIL, _MEAN = 0.9, 0.45, 1.2, 0.8


class SyntheticVectors:
    """A collection of any size; the first rows of a larger one are those of a smaller.

    Args:
        dim: Length of a vector.
        seed: Of everything.
    """

    def __init__(self, dim: int = 512, seed: int = 0) -> None:
        random = np.random.default_rng([seed, 0])
        self.dim, self._seed = dim, seed
        self._spectrum = (np.arange(1, dim + 1) ** -0.4).astype(np.float32)
        self._spectrum /= np.sqrt(np.mean(self._spectrum**2))
        self._rotation = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
        self._topics = self._shaped(random, _NUM_TOPICS)
        shares = 1.0 / np.arange(1, _NUM_TOPICS + 1)
        self._shares = shares / shares.sum()
        self._means = _MEAN * self._shaped(random, 2)

    def blocks(self, num_rows: int) -> Iterator[Floats]:
        """Yield float32 (at most `BLOCK_ROWS`, dim) of unit length, `num_rows` in all."""
        for number, start in enumerate(range(0, num_rows, BLOCK_ROWS)):
            scenes = self._scenes(number)
            details = self._shaped(np.random.default_rng([self._seed, 2, number]), BLOCK_ROWS)
            rows = np.repeat(scenes, SEGMENTS_PER_VIDEO, axis=0) + _SEGMENT * details
            # the whole block, however few are wanted: the last bit of a product may depend on its height
            yield self._finish(rows, self._means[0])[: num_rows - start]

    def texts(self, count: int, num_rows: int, seed: int = 0) -> Floats:
        """Return float32 (count, dim), each about one of the videos of the first `num_rows` rows."""
        random = np.random.default_rng([self._seed, 3, seed])
        num_videos = max(1, num_rows // SEGMENTS_PER_VIDEO)
        videos_per_block = BLOCK_ROWS // SEGMENTS_PER_VIDEO
        videos = random.integers(num_videos, size=count)
        scenes = np.empty((count, self.dim), np.float32)
        for number in np.unique(videos // videos_per_block).tolist():
            mine = videos // videos_per_block == number
            scenes[mine] = self._scenes(number)[videos[mine] % videos_per_block]
        return self._finish(scenes + _TEXT_DETAIL * self._shaped(random, count), self._means[1])

    def _scenes(self, block: int) -> Floats:
        random = np.random.default_rng([self._seed, 1, block])
        count = BLOCK_ROWS // SEGMENTS_PER_VIDEO
        topics = self._topics[random.choice(_NUM_TOPICS, size=count, p=self._shares)]
        scenes: Floats = topics + _SCENE * self._shaped(random, count)
        return scenes

    def _shaped(self, random: np.random.Generator, count: int) -> Floats:
        shaped: Floats = random.standard_normal((count, self.dim), dtype=np.float32) * self._spectrum
        return shaped

    def _finish(self, latent: Floats, mean: Floats) -> Floats:
        rows = (latent + mean) @ self._rotation
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return np.ascontiguousarray(rows, np.float32)
