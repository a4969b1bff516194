"""Processes x workers x data sizes x resuming at every batch: nothing missing, nothing doubled, one order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlm.data import Loader, LoaderConfig
from vlm.data.mixture import GlobalOrder
from vlm.data.sources import FrameChooser, Sample
from vlm.types import Preprocessing

TINY = Preprocessing(num_frames=1, image_size=2)
FRAME = np.zeros((1, 2, 2, 3), np.uint8)
FINGERPRINT = "0f" * 32


class Numbered:
    """``count`` samples in shards of uneven sizes, some empty."""

    fingerprint = FINGERPRINT

    def __init__(self, count: int) -> None:
        sizes: list[int] = []
        while sum(sizes) < count:
            sizes.append(min(count - sum(sizes), (0, 1, 13, 4, 7)[len(sizes) % 5]))
        self.shard_sizes = tuple(sizes)

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        return Sample(key=f"{shard}/{number}", frames=FRAME, captions=(f"{shard}", f"{number}"))

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        return {}


def run(source: Numbered, batch_size: int, world_size: int, workers: int, start: int) -> list[list[tuple]]:
    """Global batches from ``start`` to the end of the second epoch, put together from all processes."""
    config = LoaderConfig(batch_size=batch_size, seed=7, workers=workers)
    parts = [
        Loader(source, TINY, config, rank=rank, world_size=world_size).batches(start, num_epochs=2)
        for rank in range(world_size)
    ]
    return [
        [(clip.key, clip.caption) for part in batch for clip in part.clips]
        for batch in zip(*parts, strict=True)
    ]


def truth(source: Numbered, batch_size: int) -> list[list[str]]:
    """What the batches hold, from the order alone."""
    keys = []
    for epoch in (0, 1):
        order = GlobalOrder(source.shard_sizes, FINGERPRINT, 7, epoch)
        keys += ["{}/{}".format(*order[position]) for position in range(len(order))]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (7, 4), (61, 16)])
def test_resuming_at_every_batch(count: int, batch_size: int, world_size: int, workers: int) -> None:
    source = Numbered(count)
    whole = run(source, batch_size, 1, 0, 0)
    keys = [[key for key, _ in batch] for batch in whole]
    assert keys == truth(source, batch_size)
    epochs = [key for batch in keys for key in batch]
    assert len(set(epochs[:count])) == len(set(epochs[count:])) == count
    for first in range(len(whole)):
        assert run(source, batch_size, world_size, workers, first) == whole[first:]


@pytest.mark.parametrize(("count", "batch_size"), [(1003, 128), (10_007, 1024)])
@pytest.mark.parametrize("world_size", [3, 8])
def test_larger_sets(count: int, batch_size: int, world_size: int) -> None:
    """Resumed once, in the middle of the second epoch, by another number of processes."""
    source = Numbered(count)
    expected = truth(source, batch_size)
    first = -(-3 * count // 2) // batch_size
    found = run(source, batch_size, world_size, 2, first)
    assert [[key for key, _ in batch] for batch in found] == expected[first:]
    assert sum(map(len, expected)) == 2 * count
    everything = [key for batch in expected for key in batch]
    assert len(set(everything[:count])) == len(set(everything[count:])) == count
