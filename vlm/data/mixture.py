"""Several sources as one, several corpora by turns, and the order of it all.

Every order is a pure function of contents, seed and epoch.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.data.augmentation import counter_bits
from vlm.data.shards.layout import Media
from vlm.data.sources import FrameChooser, Sample, SampleSource

_SHARDS, _SAMPLES, _TURNS = 2, 3, 4  # purposes of random numbers, so that no draw is used twice


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
        return _joint_fingerprint(self._sources)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each part of each source, in order."""
        return tuple(size for source in self._sources for size in source.shard_sizes)

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        """Load from the source that the part belongs to, whose number becomes the sample's origin.

        Raises what the source raises.
        """
        source, inner = self._places[shard]
        return replace(self._sources[source].load(inner, number, choose), origin=str(source))

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        """Return where the sample lies, with the number of its source."""
        source, inner = self._places[shard]
        return {"source": source, **self._sources[source].locate(inner, number)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A source whose samples share batches with those of no other.

    Attributes:
        source: Its samples.
        name: Its name, unique among the corpora of a run.
        media: Videos, or pictures, which are clips of one frame.
        batch_size: Samples of a global batch; None for that of all corpora.
        weight: How often it is gone through while a corpus of weight 1 is gone through once.
        templates: Wordings of the captions, each with ``{}`` in the place of one; one at random is read at
            each visit. Empty for captions as they are.
    """

    source: SampleSource
    name: str = ""
    media: Media = "video"
    batch_size: int | None = None
    weight: float = 1.0
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"corpus {self.name!r}: expected batch_size >= 1, got {self.batch_size}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"corpus {self.name!r}: expected a finite weight above 0, got {self.weight}")
        if not all(template.count("{}") == 1 for template in self.templates):
            raise ValueError(f"corpus {self.name!r}: expected one {{}} in each of {list(self.templates)}")

    @property
    def num_samples(self) -> int:
        """Samples of one pass."""
        return sum(self.source.shard_sizes)


class Turn(NamedTuple):
    """Whose batch it is: the corpus by number, and how many batches of that corpus came before."""

    corpus: int
    ordinal: int


class Turns:
    """Which corpus each batch of a run comes from; nothing but the arguments decides it.

    In an epoch a corpus of weight 1 is gone through once. Its passes are laid end to end and cut into full
    batches, of which ceil((e + 1) weight n / batch size) are over after epoch e: all that the epochs so far
    owe of its n samples, and less than a batch of what follows. The turns of an epoch are shuffled.

    Args:
        corpora: Of the run, in an order that is always the same.
        batch_size: Of the corpora that have none of their own.
        seed: Of the run.
        shuffle: False = one corpus after the other.

    Source: Li et al. 2024, VideoMamba, released training code, which shuffles the batches of its loaders of
        pictures and of videos anew in every epoch.
    """

    def __init__(
        self, corpora: Sequence[Corpus], batch_size: int, *, seed: int, shuffle: bool = True
    ) -> None:
        self._samples = [corpus.num_samples * Fraction(str(corpus.weight)) for corpus in corpora]
        sizes = [corpus.batch_size or batch_size for corpus in corpora]
        self._batches = [samples / size for samples, size in zip(self._samples, sizes, strict=True)]
        self._seed, self._shuffle = seed, shuffle
        self._stream = int(_joint_fingerprint([corpus.source for corpus in corpora])[:16], 16)
        self._round = functools.lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, number: int) -> Turn:
        """Return the turn of a batch of the run, counted from 0."""
        epoch = self._epoch(number)
        corpora, ordinals = self._round(epoch)
        place = number - self.before(epoch)
        return Turn(int(corpora[place]), int(ordinals[place]))

    def before(self, epoch: int) -> int:
        """Return the number of batches before an epoch."""
        return sum(math.ceil(epoch * batches) for batches in self._batches)

    def samples_before(self, corpus: int, epoch: int) -> int:
        """Return the number of samples of a corpus that belong to the epochs before this one."""
        return math.ceil(epoch * self._samples[corpus])

    def counts(self, number: int) -> tuple[int, ...]:
        """Return how many of the first ``number`` batches are of each corpus."""
        epoch = self._epoch(number)
        begun = np.bincount(
            self._round(epoch)[0][: number - self.before(epoch)], minlength=len(self._batches)
        )
        whole = [math.ceil(epoch * batches) for batches in self._batches]
        return tuple((begun + whole).tolist())

    def _epoch(self, number: int) -> int:
        latest = int(number / sum(self._batches)) + 2
        return bisect.bisect_right(range(latest), number, key=self.before) - 1

    def _shuffled(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the corpora of an epoch's batches in order, and each batch's number in its corpus."""
        first = [math.ceil(epoch * batches) for batches in self._batches]
        last = [math.ceil((epoch + 1) * batches) for batches in self._batches]
        corpora = np.repeat(np.arange(len(first)), np.subtract(last, first))
        ordinals = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        if not self._shuffle:
            return corpora, ordinals
        bits = counter_bits(self._seed, epoch, 0, _TURNS, self._stream)
        corpora = corpora[np.argsort(bits.random_raw(len(corpora)), kind="stable")]
        in_order = np.empty_like(ordinals)  # a corpus keeps its own order
        in_order[np.argsort(corpora, kind="stable")] = ordinals
        return corpora, in_order


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


def _joint_fingerprint(sources: Sequence[SampleSource]) -> str:
    return hashlib.sha256("\n".join(source.fingerprint for source in sources).encode()).hexdigest()
