"""Samples made on the spot, whose frames carry their number, and what loaders are asked with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm.data import LoaderConfig
from vlm.data.sources import FrameChooser, Sample
from vlm.errors import DataError
from vlm.types import Preprocessing

SMALL = Preprocessing(num_frames=2, image_size=8)


class Painted:
    """Samples made on the spot; those named in ``bad`` cannot be read."""

    def __init__(
        self, sizes: tuple[int, ...], bad: tuple[tuple[int, int], ...] = (), name: str = "ab"
    ) -> None:
        self.shard_sizes, self.bad, self.fingerprint = sizes, bad, name * 32

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        if (shard, number) in self.bad:
            raise DataError(f"{shard}/{number}: cannot be read", "checksum")
        chosen = choose(20)
        frames = np.broadcast_to(chosen.astype(np.uint8)[:, None, None, None], (len(chosen), 8, 8, 3)).copy()
        frames[:, 0] = shard * 20 + number
        key = f"{shard}/{number}"
        return Sample(key=key, frames=frames, captions=(f"caption of {key}", f"other of {key}"))

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        return {"shard": f"shard-{shard}", "number": number}


def config(**changes: Any) -> LoaderConfig:
    return LoaderConfig(**{"batch_size": 7, "workers": 0, "max_bad_fraction": 1.0, **changes})


def content(batch) -> list[tuple[str, str, bytes]]:
    return [(clip.key, clip.caption, clip.pixels.tobytes()) for clip in batch.clips]


SIZES = (5, 3, 1, 9, 5)  # 23 samples: divisible by nothing
EVERY = {f"{shard}/{number}" for shard, size in enumerate(SIZES) for number in range(size)}
