"""Several sources as one, and the order of an epoch: a pure function of contents, seed and epoch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.data.augmentation import counter_bits
from vlm.data.sources import FrameChooser, Sample, SampleSource

_SHARDS, _SAMPLES = 2, 3  # purposes of random numbers, so that no draw is used twice


class Mixture:
    """All samples of several sources, each once an epoch.

    Raises:
        ValueError: There is no source.
    """

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        if not sources:
            raise ValueError("expected at least one source")
        self._sources = list(sources)
        self._places = [(s, i) for s, source in enumerate(sources) for i in range(len(source.shard_sizes))]

    @property
    def fingerprint(self) -> str:
        """Hash of the sources' hashes, in order."""
        return hashlib.sha256("\n".join(s.fingerprint for s in self._sources).encode()).hexdigest()

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each part of each source, in order."""
        return tuple(size for source in self._sources for size in source.shard_sizes)

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        """Load from the source that the part belongs to; raises what it raises."""
        source, inner = self._places[shard]
        return self._sources[source].load(inner, number, choose)

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        """Return where the sample lies, with the number of its source."""
        source, inner = self._places[shard]
        return {"source": source, **self._sources[source].locate(inner, number)}


class GlobalOrder:
    """The order in which an epoch visits samples; nothing but the arguments decides it.

    Shards are shuffled, then samples within runs of ``group_size`` shards, so that reading stays local. The
    raw output of a counter-based generator is sorted, which is the same on every machine.

    Args:
        shard_sizes: Samples of each shard.
        fingerprint: Hash of the contents, in hex.
        seed: Of the run.
        epoch: Counted from 0.
        shuffle: False = the order in which they lie.
        group_size: Shards that are shuffled together.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        fingerprint: str,
        seed: int,
        epoch: int,
        *,
        shuffle: bool = True,
        group_size: int = 16,
    ) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._seed, self._epoch, self._shuffle, self._group_size = seed, epoch, shuffle, group_size
        self._stream = int(fingerprint[:16], 16)
        self._shards = self._permutation(len(self._sizes), 0, _SHARDS)
        starts = np.arange(0, len(self._sizes), group_size)
        self._ends = np.cumsum(np.add.reduceat(self._sizes[self._shards], starts)) if len(starts) else starts
        self._members = functools.lru_cache(maxsize=4)(self._group)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (shard, number in it) of the sample at a position of the epoch."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of an epoch of {len(self)} samples")
        group = int(np.searchsorted(self._ends, position, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        shard, number = self._members(group)[position - first].tolist()
        return shard, number

    def _group(self, group: int) -> npt.NDArray[np.int64]:
        """Return the (n, 2) samples of a run of shards, in order."""
        shards = self._shards[group * self._group_size : (group + 1) * self._group_size]
        sizes = self._sizes[shards]
        numbers = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.stack([np.repeat(shards, sizes), numbers], axis=1)
        return rows[self._permutation(len(rows), group, _SAMPLES)]

    def _permutation(self, length: int, number: int, purpose: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(length, dtype=np.int64)
        bits = counter_bits(self._seed, self._epoch, number, purpose, self._stream)
        return np.argsort(bits.random_raw(length), kind="stable").astype(np.int64)
