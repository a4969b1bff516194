"""What a worker does with one sample: load it, choose frames and a caption, resize or change the frames."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vlm.data.augmentation import AugmentationConfig, augment, names_side, sample_rng
from vlm.data.collate import Clip
from vlm.data.frame_sampling import dense_frames, dense_view, middle_frames, random_frames
from vlm.data.mixture import Corpus
from vlm.data.preprocessing import fit
from vlm.data.sources import Sample
from vlm.errors import DataError
from vlm.types import Preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How samples become batches.

    Attributes:
        batch_size: Samples of a global batch, over all processes; a corpus may have its own.
        parts: A global batch is handed out as this many, one after the other.
        seed: Every draw follows from it.
        shuffle: Visit the samples in a new order each epoch.
        random_frames: A random frame of each span, instead of the middle one.
        stride: Frames this far apart from one random (else the middle) stretch, instead of one of each span
            of the whole clip; 0 = spans.
        random_caption: One caption at random, instead of the first.
        augmentation: Random changes of the pictures; None for none. A clip of which a caption names a side is
            never mirrored.
        repeats: Clips that are made of each sample, side by side in its batch: the same frames, each clip
            with random changes of its own.
        workers: Threads or processes that load; 0 = load in the calling thread.
        worker_kind: ``thread`` (decoding lets other threads run) or ``process`` (spawned).
        prefetch: Batches prepared ahead.
        max_bad_fraction: Share of the samples of a corpus that may be rejected before the run stops.
        fill: Repeat a batch's healthy samples in place of rejected ones, so that processes hold equally many;
            if this process's part of a batch has none, the samples that follow it in the epoch stand in.
    """

    batch_size: int = 32
    parts: int = 1
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
        if self.repeats < 1 or self.parts < 1 or self.stride < 0:
            raise ValueError("expected repeats >= 1, parts >= 1 and stride >= 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")


class Task(NamedTuple):
    """A visit of a sample: its corpus by number, that corpus's epoch and place in it, and where it lies."""

    corpus: int
    epoch: int
    position: int
    shard: int
    number: int


class Failure(NamedTuple):
    """Why a sample cannot be used."""

    reason: str
    detail: str


Result: TypeAlias = list[Clip] | Failure


class Preparation:
    """From a visit to the clips that are made of it; picklable.

    Args:
        corpora: Where samples come from.
        preprocessing: Size and number of frames of videos; pictures have one frame.
        config: What is chosen and changed.
    """

    def __init__(self, corpora: Sequence[Corpus], preprocessing: Preprocessing, config: LoaderConfig) -> None:
        self._corpora, self._config = corpora, config
        self._preprocessing = [fitting(corpus, preprocessing) for corpus in corpora]

    def __call__(self, task: Task) -> Result:
        """Return the clips, or why there are none."""
        corpus, config = self._corpora[task.corpus], self._config
        wanted = self._preprocessing[task.corpus].num_frames
        rng = sample_rng(config.seed, task.epoch, task.position, task.corpus)

        def choose(available: int) -> npt.NDArray[np.int64]:
            if config.stride and config.random_frames:
                return dense_frames(available, wanted, config.stride, rng)
            if config.stride:
                return dense_view(available, wanted, config.stride, 0, 1)
            if config.random_frames:
                return random_frames(available, wanted, rng)
            return middle_frames(available, wanted)

        try:
            sample = corpus.source.load(task.shard, task.number, choose)
        except DataError as error:
            return Failure(error.reason, str(error))
        caption = sample.captions[int(rng.integers(len(sample.captions))) if config.random_caption else 0]
        text = caption
        if corpus.templates:
            text = corpus.templates[int(rng.integers(len(corpus.templates)))].replace("{}", caption)
        return [
            Clip(
                key=sample.key,
                origin="/".join(filter(None, (corpus.name, sample.origin))),
                pixels=self._pixels(sample, self._preprocessing[task.corpus], rng),
                caption=caption,
                text=text,
                captions=sample.captions,
                metadata=dict(sample.metadata),
            )
            for _ in range(config.repeats)
        ]

    def _pixels(self, sample: Sample, p: Preprocessing, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        augmentation = self._config.augmentation
        if augmentation is None:
            pixels = fit(sample.frames, p)
        else:
            if augmentation.flip and any(map(names_side, sample.captions)):
                augmentation = replace(augmentation, flip=0.0)
            pixels = augment(sample.frames, p, augmentation, rng)
        result: npt.NDArray[np.uint8] = pixels.contiguous().numpy()
        return result


def fitting(corpus: Corpus, preprocessing: Preprocessing) -> Preprocessing:
    """Return how clips of a corpus are made: a picture is a clip of one frame."""
    return replace(preprocessing, num_frames=1) if corpus.media == "image" else preprocessing


def start_workers(
    preparation: Preparation, config: LoaderConfig
) -> tuple[Executor, Callable[[Task], Result]]:
    """Return what runs tasks, and the function to hand to it with each."""
    if config.workers == 0:
        return _Inline(), preparation
    if config.worker_kind == "thread":
        return _Threads(config.workers), preparation
    # spawned: a fork would copy the locks of other threads in whatever state they are
    pool = ProcessPoolExecutor(
        config.workers, get_context("spawn"), initializer=_start_process, initargs=(preparation,)
    )
    return pool, _run_in_process


class _Inline(Executor):
    """Runs each task at once in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Threads(ThreadPoolExecutor):
    """Threads whose tensor operations stay in them: a team of OpenMP for each would fight over the cores."""

    def __init__(self, workers: int) -> None:
        self._before = torch.get_num_threads()  # also settles the number of the thread that trains
        super().__init__(workers, "vlm-data", initializer=torch.set_num_threads, initargs=(1,))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        torch.set_num_threads(self._before)  # what threads that start from now on begin with


_preparation_of_this_process: Preparation | None = None


def _start_process(preparation: Preparation) -> None:
    global _preparation_of_this_process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    torch.set_num_threads(1)
    _preparation_of_this_process = preparation


def _run_in_process(task: Task) -> Result:
    assert _preparation_of_this_process is not None
    return _preparation_of_this_process(task)
