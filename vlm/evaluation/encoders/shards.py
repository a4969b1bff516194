"""The videos of a benchmark, encoded by several processes or machines into one cache, none of them twice."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from vlm.errors import InvalidInput, UsageError, VlmError
from vlm.evaluation.dataset import EvaluationSet, refuse_missing
from vlm.evaluation.encoders.sources import open_encoder
from vlm.evaluation.encoders.stored import StoredFeatures
from vlm.evaluation.features import Loader, encode_videos
from vlm.evaluation.protocol import Protocol, load_protocol, require_task
from vlm.evaluation.runner import RunOptions, open_cache
from vlm.types import VideoTextEncoder


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``number`` of ``count``, counted from 0: every ``count``-th video."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``I/N``, such as ``0/4``.

        Raises:
            UsageError: It is not written so.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()) or not int(number) < int(count):
            raise UsageError(f"--shard: expected I/N with 0 <= I < N, such as 0/4, got {text!r}")
        return cls(int(number), int(count))


def encode_shard(
    model: VideoTextEncoder,
    data: EvaluationSet,
    protocol: Protocol,
    load: Loader,
    shard: Shard,
    options: RunOptions,
) -> int:
    """Encode one part of a set's videos into the cache, and return how many were not there yet.

    Videos that are in the cache are not opened, so a part that was killed goes on where it was, up to the
    batch that was under way.

    Raises:
        InvalidInput: There is no cache, or more videos cannot be read than are allowed.
        NoSpaceError: The disk is full; what was written stays.
    """
    cache = open_cache(model, protocol, options.cache)
    if cache is None:
        raise InvalidInput("a part of the videos can only be encoded into a cache: --cache DIR")
    part = range(shard.number, len(data.paths), shard.count)
    found = encode_videos(
        model,
        data.paths,
        load,
        batch_size=options.batch_size,
        variants=options.variants(model),
        keep_tokens=protocol.rerank_k > 0 and "rerank" in model.capabilities,
        cache=cache,
        only=part,
    )
    unread = [(str(data.paths[clip]), reason) for clip, reason in found.rejected]
    refuse_missing(unread, len(part), options.allow_missing, "clips of this part")
    return found.num_encoded


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """What a process needs to know to encode its part; everything by name."""

    source: str
    protocol: str
    annotations: Path
    videos: Path
    overrides: tuple[str, ...]
    device: str
    options: RunOptions


def encode_source(task: ShardTask, shard: Shard) -> int:
    """Encode one part of what a task names, and return how many videos were not in the cache yet.

    Raises:
        InvalidInput: Protocol, annotations, videos, model or cache cannot be used.
        NoSpaceError: The disk is full; what was written stays.
    """
    from vlm.evaluation.launch import load_clip, read_annotations  # it imports this module

    protocol = load_protocol(task.protocol, task.overrides)
    require_task(protocol, "retrieval")
    data = read_annotations(protocol, task.annotations, task.videos)
    model = open_encoder(task.source, protocol.frames, task.device)
    if isinstance(model, StoredFeatures):
        raise InvalidInput(f"{task.source} holds features already; leave --shard and --processes out")
    load = partial(load_clip, trim_s=protocol.trim_s)
    return encode_shard(model, data, protocol, load, shard, task.options)


def run_in_processes(task: ShardTask, num_processes: int) -> None:
    """Encode all parts of a set by as many processes; on GPUs, process i takes GPU i of those there are.

    Raises:
        InvalidInput: A process failed; what it had encoded stays in the cache.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    workers = [
        context.Process(target=_work, args=(task, Shard(number, num_processes), threads))
        for number in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [str(number) for number, worker in enumerate(workers) if worker.exitcode]
    if failed:
        raise InvalidInput(
            f"{len(failed)} of {num_processes} processes failed while they encoded videos (part "
            f"{', '.join(failed)}); what was encoded is kept: run the same command again to go on"
        )


def _work(task: ShardTask, shard: Shard, threads: int) -> None:
    torch.set_num_threads(threads)
    device = task.device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{shard.number % torch.cuda.device_count()}"
    try:
        encode_source(replace(task, device=device), shard)
    except VlmError as error:
        raise SystemExit(f"part {shard.number}: {error}") from error
