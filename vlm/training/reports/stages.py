"""Where the time of training on shards goes: each stage apart, and whether the workers keep the model fed."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from vlm.data import ClipBatch, Loader
from vlm.data.preparation import Preparation, Task
from vlm.data.sources import FrameChooser, Sample, SampleSource
from vlm.errors import ConfigError
from vlm.training.config import TrainingConfig
from vlm.training.loop import RunState, build
from vlm.training.setup import prepare_process
from vlm.training.sources.shards import loading, make_loader, open_corpora, to_batch

STAGES = ("wait", "host_to_device", "forward", "backward", "optimizer", "other")
_WARM_UP = 2
_SAMPLES = 24


def measure_stages(config: TrainingConfig, workers: Sequence[int], updates: int) -> dict[str, Any]:
    """Train a little, with one number of data workers after another; what is learned is thrown away.

    Args:
        config: A run on shards with the plain engine; ``data.workers`` is not used.
        workers: How many data workers to try.
        updates: Timed updates for each, after two that are not.

    Returns:
        ``samples`` of each corpus. ``sample_ms``: what one thread needs for one, ``decode`` with reading and
        checking, and ``transform``. ``update_ms``: the stages of an update whose batch is at hand, with the
        losses of the middle of the run; ``backward`` with averaging and clipping of gradients.
        ``compute_samples_per_s``: what the model could train on.
        ``workers``: for each number of them ``decode_samples_per_s``, what they deliver while no model
        computes; ``samples_per_s`` of both together; ``data_wait``, the share of time that the model waits;
        ``of_slower_limit``, what is achieved of the lower of the two limits; and the stages.

    Raises:
        ConfigError: The data are not shards, or the engine is not the plain one.
    """
    if config.data.source != "shards" or config.engine.name != "plain" or config.classification is not None:
        raise ConfigError(
            "expected a run on shards with the plain engine: set data.source=shards and engine.name=plain"
        )
    device = prepare_process(config)
    with tempfile.TemporaryDirectory() as folder:
        state = build(config, Path(folder), device)
    batch_size = config.train.batch_size
    parts = config.train.accumulate
    with _open(config, state, 0) as (loader, batches):
        clips = [next(batches) for _ in range(parts)]
    watch = _Stopwatch(device)
    with watch.within(state):
        for number in range(-_WARM_UP, updates):
            if number == 0:
                watch.clear()
            _update(watch, state, loader, clips)
    alone = watch.seconds()
    compute = updates * batch_size / sum(alone.values())
    rows = [_fed(config, state, count, updates, compute) for count in workers]
    return {
        "samples": {corpus.name: corpus.num_samples for corpus in open_corpora(config.data.shards)},
        "batch_size": batch_size,
        "updates": updates,
        "sample_ms": _sample_ms(config, state),
        "update_ms": {name: 1e3 * alone[name] / updates for name in STAGES if name != "wait"},
        "compute_samples_per_s": compute,
        "workers": rows,
    }


def _fed(
    config: TrainingConfig, state: RunState, workers: int, updates: int, compute: float
) -> dict[str, Any]:
    """Time the loader alone, then training with it."""
    batch_size, parts, device = config.train.batch_size, config.train.accumulate, state.model.device
    with _open(config, state, workers) as (_, batches):
        for _ in range(_WARM_UP * parts):
            next(batches)
        begin = time.perf_counter()
        for _ in range(updates * parts):
            next(batches)
        decode = updates * batch_size / (time.perf_counter() - begin)
    watch = _Stopwatch(device)
    with _open(config, state, workers) as (loader, batches), watch.within(state):
        for number in range(-_WARM_UP, updates):
            if number == 0:
                watch.clear()
            clips = [next(batches) for _ in range(parts)]
            watch.mark("wait")
            _update(watch, state, loader, clips)
    seconds = watch.seconds()
    total = sum(seconds.values())
    achieved = updates * batch_size / total
    return {
        "workers": workers,
        "decode_samples_per_s": decode,
        "samples_per_s": achieved,
        "data_wait": seconds["wait"] / total,
        "of_slower_limit": achieved / min(decode, compute),
        "update_ms": {name: 1e3 * seconds[name] / updates for name in STAGES},
    }


def _update(watch: _Stopwatch, state: RunState, loader: Loader, clips: list[ClipBatch]) -> None:
    words = state.config.data.max_words
    parts = [to_batch(part, loader, state.model, words) for part in clips]
    watch.mark("host_to_device")
    state.update(parts, state.config.train.max_steps // 2, 0)
    watch.mark("other")


@contextmanager
def _open(
    config: TrainingConfig, state: RunState, workers: int
) -> Iterator[tuple[Loader, Iterator[ClipBatch]]]:
    config = replace(config, data=replace(config.data, workers=workers))
    loader = make_loader(config, state.model)
    with closing(cast(Any, loader.batches())) as batches:
        yield loader, batches


def _sample_ms(config: TrainingConfig, state: RunState) -> dict[str, float]:
    """Prepare a few samples in this thread; return the milliseconds that one takes."""
    corpora = open_corpora(config.data.shards)
    sources = [_Timed(corpus.source) for corpus in corpora]
    timed = [replace(corpus, source=source) for corpus, source in zip(corpora, sources, strict=True)]
    preparation = Preparation(timed, state.model.preprocessing, loading(config))
    tasks = [
        Task(number, 0, place, shard, place)
        for number, source in enumerate(sources)
        for shard, size in enumerate(source.shard_sizes)
        for place in range(size)
    ]
    tasks = tasks[:: max(1, len(tasks) // _SAMPLES)]
    preparation(tasks[0])
    for source in sources:
        source.seconds = 0.0
    begin = time.perf_counter()
    for task in tasks:
        preparation(task)
    total, decode = time.perf_counter() - begin, sum(source.seconds for source in sources)
    return {"decode": 1e3 * decode / len(tasks), "transform": 1e3 * (total - decode) / len(tasks)}


class _Stopwatch:
    """Adds up the time between marks, each counted to the stage that it ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._last = self._now()

    def mark(self, stage: str) -> None:
        now = self._now()
        self._seconds[stage] += now - self._last  # type: ignore[assignment]
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {name: float(self._seconds[name]) for name in STAGES}

    @contextmanager
    def within(self, state: RunState) -> Iterator[None]:
        """Mark the borders that lie within an update."""
        hooks = [
            state.module.register_forward_pre_hook(lambda *_: self.mark("other")),
            state.module.register_forward_hook(lambda *_: self.mark("forward")),
            register_optimizer_step_pre_hook(lambda *_: self.mark("backward")),
            register_optimizer_step_post_hook(lambda *_: self.mark("optimizer")),
        ]
        self.clear()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Timed:
    """A source that notes how long its samples take to load."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source
        self.fingerprint, self.shard_sizes = source.fingerprint, source.shard_sizes
        self.seconds = 0.0

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        begin = time.perf_counter()
        try:
            return self._source.load(shard, number, choose)
        finally:
            self.seconds += time.perf_counter() - begin

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        return self._source.locate(shard, number)
