"""The pipeline: order → this process's share → load and prepare in workers → batches, in that order.

The only state is the number of samples that were handed out; worker count, worker kind and prefetching never
change what a batch holds, and the split over processes never changes what a global batch holds.
"""

from __future__ import annotations

import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vlm.data.augmentation import AugmentationConfig, augment, sample_rng
from vlm.data.collate import Clip, ClipBatch, stack_clips
from vlm.data.frame_sampling import dense_frames, dense_view, middle_frames, random_frames
from vlm.data.mixture import GlobalOrder
from vlm.data.preprocessing import fit
from vlm.data.shards.layout import write_atomically
from vlm.data.sources import SampleSource
from vlm.errors import DataError, VlmError
from vlm.types import Preprocessing

_MOST_BAD_IN_A_ROW = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How samples become batches.

    Attributes:
        batch_size: Samples of a global batch, over all processes.
        seed: Every draw follows from it.
        shuffle: Visit the samples in a new order each epoch.
        random_frames: A random frame of each span, instead of the middle one.
        stride: Frames this far apart from one random (else the middle) stretch, instead of one of each span
            of the whole clip; 0 = spans.
        random_caption: One caption at random, instead of the first.
        augmentation: Random changes of the pictures; None for none.
        repeats: Clips that are made of each sample, side by side in its batch: the same frames, each clip
            with random changes of its own.
        workers: Threads or processes that load; 0 = load in the calling thread.
        worker_kind: ``thread`` (decoding lets other threads run) or ``process`` (spawned).
        prefetch: Batches prepared ahead.
        max_bad_fraction: Share of all samples that may be rejected before the run stops.
        fill: Repeat a batch's healthy samples in place of rejected ones, so that processes hold equally many;
            if this process's part of a batch has none, the samples that follow it in the epoch stand in.
    """

    batch_size: int = 32
    seed: int = 0
    shuffle: bool = True
    random_frames: bool = True
    stride: int = 0
    random_caption: bool = True
    augmentation: AugmentationConfig | None = None
    repeats: int = 1
    workers: int = 2
    worker_kind: Literal["thread", "process"] = "thread"
    prefetch: int = 2
    max_bad_fraction: float = 0.01
    fill: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0 or self.prefetch < 1:
            raise ValueError("expected batch_size >= 1, workers >= 0 and prefetch >= 1")
        if self.repeats < 1 or self.stride < 0:
            raise ValueError("expected repeats >= 1 and stride >= 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")


@dataclass(slots=True)
class Tally:
    """What was seen: this process's counts, and the places of all samples known to be unusable."""

    seen: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    bad_places: set[tuple[int, int]] = field(default_factory=set)


class _Task(NamedTuple):
    epoch: int
    position: int
    shard: int
    number: int


class _Failure(NamedTuple):
    reason: str
    detail: str


_Result: TypeAlias = list[Clip] | _Failure


class Loader:
    """Batches of an endless sequence of epochs, from any point on, for one of several processes.

    Epoch after epoch is laid end to end and cut into global batches, so that each sample appears exactly once
    an epoch and every batch but the very last is full. Process ``rank`` gets a contiguous part of each.

    Args:
        source: Where samples come from.
        preprocessing: Size, number of frames, normalisation.
        config: How samples become batches.
        rank: Which of the processes this is.
        world_size: How many there are.
        quarantine: File that rejected samples are appended to, one JSON object a line, each visit once. What
            an earlier run wrote there up to the point where this one starts counts against the budget.
    """

    def __init__(
        self,
        source: SampleSource,
        preprocessing: Preprocessing,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        quarantine: Path | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got {rank} of {world_size}")
        self._source, self._preprocessing, self._config = source, preprocessing, config
        self._rank, self._world_size, self._quarantine = rank, world_size, quarantine
        self._order: tuple[int, GlobalOrder] | None = None
        self._bad_in_a_row = 0
        self._untold: list[tuple[int, int]] = []  # bad places that have not yet gone out with a batch
        self._last = ""
        self._listed: set[tuple[int, int]] = set()
        self.num_samples = sum(source.shard_sizes)
        self.tally = Tally()
        if self.num_samples == 0:
            raise DataError("the data set holds no sample", "empty")

    def batches(self, start: int = 0, num_epochs: int | None = None) -> Iterator[ClipBatch]:
        """Yield batches.

        Args:
            start: Samples of the global sequence already consumed (`ClipBatch.consumed`): the whole state.
            num_epochs: Stop after the epoch of this number; None goes on for ever.

        Raises:
            DataError: Too many samples were rejected (``too_many_bad``).
            VlmError: A worker process died.
        """
        end = None if num_epochs is None else num_epochs * self.num_samples
        self._recall(start)
        ahead = self._config.prefetch if self._config.workers else 1
        waiting: deque[tuple[int, int, list[_Task], list[Future[_Result]]]] = deque()
        executor, run = self._start_workers()
        try:
            while True:
                while len(waiting) < ahead and (end is None or start < end):
                    stop = start + self._config.batch_size
                    stop = stop if end is None else min(stop, end)
                    tasks = [self._task(number) for number in self._share(start, stop)]
                    waiting.append((start, stop, tasks, [executor.submit(run, task) for task in tasks]))
                    start = stop
                if not waiting:
                    return
                first, stop, tasks, futures = waiting.popleft()
                yield self._batch(first, stop, tasks, [future.result() for future in futures])
        except BrokenExecutor as error:
            raise VlmError("a data worker died; it may have run out of memory: set fewer workers") from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _start_workers(self) -> tuple[Executor, Callable[[_Task], _Result]]:
        preparation = _Preparation(self._source, self._preprocessing, self._config)
        if self._config.workers == 0:
            return _Inline(), preparation
        if self._config.worker_kind == "thread":
            return ThreadPoolExecutor(self._config.workers, thread_name_prefix="vlm-data"), preparation
        # spawned: a fork would copy the locks of other threads in whatever state they are
        pool = ProcessPoolExecutor(
            self._config.workers, get_context("spawn"), initializer=_start_process, initargs=(preparation,)
        )
        return pool, _run_in_process

    def _share(self, start: int, stop: int) -> range:
        """Return this process's part of the global batch [start, stop); it may be empty."""
        size = stop - start
        return range(
            start + size * self._rank // self._world_size, start + size * (self._rank + 1) // self._world_size
        )

    def _task(self, number: int) -> _Task:
        epoch, position = divmod(number, self.num_samples)
        if self._order is None or self._order[0] != epoch:
            sizes, fingerprint = self._source.shard_sizes, self._source.fingerprint
            order = GlobalOrder(sizes, fingerprint, self._config.seed, epoch, shuffle=self._config.shuffle)
            self._order = (epoch, order)
        return _Task(epoch, position, *self._order[1][position])

    def _batch(self, start: int, stop: int, tasks: list[_Task], results: list[_Result]) -> ClipBatch:
        if self._world_size > 1:  # those that heard of each other have stopped together before this
            self._check_budget()
        clips: list[Clip] = []
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, _Failure):
                self._reject(task, result)
            else:
                self._bad_in_a_row = 0
                clips.extend(result)
        repeats = self._config.repeats
        self.tally.seen += len(clips) // repeats
        if self._config.fill and len(clips) < len(tasks) * repeats:
            clips = clips or self._stand_in(tasks[-1])
            healthy = len(clips)
            clips = [clips[number % healthy] for number in range(len(tasks) * repeats)]
        share = self._share(start, stop)
        rejected = tuple(self._untold)
        self._untold.clear()
        return stack_clips(
            clips,
            self._preprocessing,
            consumed=stop,
            epoch=start // self.num_samples,
            offset=(share.start - start) * repeats,
            global_size=(stop - start) * repeats,
            rejected=rejected,
        )

    def _stand_in(self, task: _Task) -> list[Clip]:
        """Return the next sample of the epoch that can be read: the same one after any stop."""
        preparation = _Preparation(self._source, self._preprocessing, self._config)
        for step in range(1, min(self.num_samples, _MOST_BAD_IN_A_ROW)):
            position = (task.position + step) % self.num_samples
            found = preparation(self._task(task.epoch * self.num_samples + position))
            if isinstance(found, list):
                return found
        raise DataError(f"none of {self.num_samples} samples can be read", "too_many_bad")

    def note_rejected(self, places: Iterable[tuple[int, int]]) -> None:
        """Count samples that any process rejected (`ClipBatch.rejected`) against the common budget.

        Several processes call it with everybody's places after each batch, and so stop at the same one.

        Raises:
            DataError: Too many samples were rejected (``too_many_bad``).
        """
        self.tally.bad_places.update(places)
        self._check_budget()

    def _recall(self, start: int) -> None:
        """Read the list of an earlier run; its last line may be torn."""
        if self._quarantine is None or not self._quarantine.exists():
            return
        text = self._quarantine.read_text(encoding="utf-8")
        complete, _, torn = text.rpartition("\n")
        for line in complete.splitlines():
            row = json.loads(line)
            self._listed.add((row["epoch"], row["position"]))
            if row["epoch"] * self.num_samples + row["position"] < start:
                self._count_place((row["place"][0], row["place"][1]))
        if torn:
            write_atomically(self._quarantine, complete + "\n" if complete else "")

    def _reject(self, task: _Task, failure: _Failure) -> None:
        """Note a sample that cannot be used; stop once there are too many."""
        self.tally.rejected[failure.reason] += 1
        self._count_place((task.shard, task.number))
        self._bad_in_a_row += 1
        self._last = failure.detail
        if self._quarantine is not None and (task.epoch, task.position) not in self._listed:
            place = self._source.locate(task.shard, task.number)
            visit = {"place": [task.shard, task.number], "epoch": task.epoch, "position": task.position}
            with self._quarantine.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**place, **visit, **failure._asdict()}) + "\n")
            self._listed.add((task.epoch, task.position))
        if self._world_size == 1:
            self._check_budget()

    def _count_place(self, place: tuple[int, int]) -> None:
        if place not in self.tally.bad_places:
            self.tally.bad_places.add(place)
            self._untold.append(place)

    def _check_budget(self) -> None:
        bad, allowed = len(self.tally.bad_places), self._config.max_bad_fraction * self.num_samples
        if bad > allowed or self._bad_in_a_row >= _MOST_BAD_IN_A_ROW:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.tally.rejected.most_common())
            raise DataError(
                f"{bad} of {self.num_samples} samples cannot be used ({reasons or 'elsewhere'}), at most "
                f"{int(allowed)} are allowed; last: {self._last or 'elsewhere'}; run vlm data verify, or "
                "raise max_bad_fraction",
                "too_many_bad",
            )


class _Preparation:
    """What a worker does with one sample; picklable."""

    def __init__(self, source: SampleSource, preprocessing: Preprocessing, config: LoaderConfig) -> None:
        self._source, self._preprocessing, self._config = source, preprocessing, config

    def __call__(self, task: _Task) -> _Result:
        config, wanted = self._config, self._preprocessing.num_frames
        rng = sample_rng(config.seed, task.epoch, task.position)

        def choose(available: int) -> npt.NDArray[np.int64]:
            if config.stride and config.random_frames:
                return dense_frames(available, wanted, config.stride, rng)
            if config.stride:
                return dense_view(available, wanted, config.stride, 0, 1)
            if config.random_frames:
                return random_frames(available, wanted, rng)
            return middle_frames(available, wanted)

        try:
            sample = self._source.load(task.shard, task.number, choose)
        except DataError as error:
            return _Failure(error.reason, str(error))
        caption = int(rng.integers(len(sample.captions))) if config.random_caption else 0
        return [
            Clip(
                key=sample.key,
                pixels=self._pixels(sample.frames, rng),
                caption=sample.captions[caption],
                captions=sample.captions,
                metadata=dict(sample.metadata),
            )
            for _ in range(config.repeats)
        ]

    def _pixels(self, frames: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        if self._config.augmentation is None:
            pixels = fit(frames, self._preprocessing)
        else:
            pixels = augment(frames, self._preprocessing, self._config.augmentation, rng)
        result: npt.NDArray[np.uint8] = pixels.contiguous().numpy()
        return result


class _Inline(Executor):
    """Runs each task at once in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


_preparation_of_this_process: _Preparation | None = None


def _start_process(preparation: _Preparation) -> None:
    global _preparation_of_this_process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    torch.set_num_threads(1)
    _preparation_of_this_process = preparation


def _run_in_process(task: _Task) -> _Result:
    assert _preparation_of_this_process is not None
    return _preparation_of_this_process(task)
