"""The pipeline: order → this process's share → load and prepare in workers → batches, in that order.

The only state is the number of batches that were handed out; worker count, worker kind and prefetching never
change what a batch holds, and the split over processes never changes what a global batch holds.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vlm.data.collate import BadPlace, Clip, ClipBatch, stack_clips
from vlm.data.mixture import Corpus, GlobalOrder, Turns
from vlm.data.preparation import Failure, LoaderConfig, Preparation, Result, Task, fitting, start_workers
from vlm.data.shards.layout import write_atomically
from vlm.data.sources import SampleSource
from vlm.errors import DataError, VlmError
from vlm.types import Preprocessing

_MOST_BAD_IN_A_ROW = 100


@dataclass(slots=True)
class Tally:
    """What was seen of a corpus: this process's counts, and the places of all its unusable samples."""

    seen: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    bad_places: set[tuple[int, int]] = field(default_factory=set)
    bad_in_a_row: int = 0
    last: str = ""


class _Plan(NamedTuple):
    """A global batch, or a part of one: samples [start, stop) of a corpus's passes laid end to end."""

    number: int
    corpus: int
    start: int
    stop: int


class Loader:
    """Batches of an endless sequence of epochs, from any point on, for one of several processes.

    Epoch after epoch of a corpus is laid end to end and cut into global batches, so that each sample appears
    exactly once an epoch and every batch but the very last is full. Corpora take turns, a batch each; see
    `Turns`. Each batch may be handed out in parts, of which process ``rank`` gets a contiguous share.

    Args:
        data: Where samples come from; or corpora, in an order that is always the same.
        preprocessing: Size, number of frames, normalisation.
        config: How samples become batches.
        rank: Which of the processes this is.
        world_size: How many there are.
        quarantine: File that rejected samples are appended to, one JSON object a line, each visit once. What
            an earlier run wrote there up to the point where this one starts counts against the budget.

    Raises:
        DataError: A corpus holds no sample (``empty``).
    """

    def __init__(
        self,
        data: SampleSource | Sequence[Corpus],
        preprocessing: Preprocessing,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        quarantine: Path | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got {rank} of {world_size}")
        self._corpora = tuple(data) if isinstance(data, Sequence) else (Corpus(source=data),)
        names = [corpus.name for corpus in self._corpora]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected at least one corpus, each with a name of its own, got {names}")
        self._sizes = [corpus.num_samples for corpus in self._corpora]
        for name, size in zip(names, self._sizes, strict=True):
            if size == 0:
                raise DataError(f"{_called(name)}the data set holds no sample", "empty")
        self._preprocessing, self._config = preprocessing, config
        self._rank, self._world_size, self._quarantine = rank, world_size, quarantine
        self._turns = Turns(self._corpora, config.batch_size, seed=config.seed, shuffle=config.shuffle)
        self._orders: dict[int, tuple[int, GlobalOrder]] = {}
        self._untold: list[BadPlace] = []  # bad places that have not yet gone out with a batch
        self._listed: set[tuple[int, int, int]] = set()
        self.tallies = tuple(Tally() for _ in self._corpora)

    def batches(self, start: int = 0, num_epochs: int | None = None) -> Iterator[ClipBatch]:
        """Yield batches.

        Args:
            start: Batches already consumed (`ClipBatch.consumed`), each part counted: the whole state.
            num_epochs: Stop after the epoch of this number; None goes on for ever.

        Raises:
            DataError: Too many samples were rejected (``too_many_bad``).
            VlmError: A worker process died.
        """
        end = None if num_epochs is None else self._turns.before(num_epochs) * self._config.parts
        self._recall(start, num_epochs)
        ahead = self._config.prefetch if self._config.workers else 1
        waiting: deque[tuple[_Plan, list[Task], list[Future[Result]]]] = deque()
        preparation = Preparation(self._corpora, self._preprocessing, self._config)
        executor, run = start_workers(preparation, self._config)
        try:
            while True:
                while len(waiting) < ahead and (end is None or start < end):
                    plan = self._plan(start, num_epochs)
                    tasks = [self._task(plan.corpus, number) for number in self._share(plan)]
                    waiting.append((plan, tasks, [executor.submit(run, task) for task in tasks]))
                    start += 1
                if not waiting:
                    return
                plan, tasks, futures = waiting.popleft()
                yield self._batch(plan, tasks, [future.result() for future in futures])
        except BrokenExecutor as error:
            raise VlmError("a data worker died; it may have run out of memory: set fewer workers") from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def note_rejected(self, places: Iterable[BadPlace]) -> None:
        """Count samples that any process rejected (`ClipBatch.rejected`) against the common budget.

        Several processes call it with everybody's places after each batch, and so stop at the same one.

        Raises:
            DataError: Too many samples were rejected (``too_many_bad``).
        """
        for corpus, shard, number in places:
            self.tallies[corpus].bad_places.add((shard, number))
        self._check_budgets()

    def _plan(self, number: int, num_epochs: int | None) -> _Plan:
        parts = self._config.parts
        corpus, ordinal = self._turns[number // parts]
        size = self._batch_size(corpus)
        start, stop = ordinal * size, (ordinal + 1) * size
        if num_epochs is not None:
            stop = min(stop, self._turns.samples_before(corpus, num_epochs))
        first, last = ((stop - start) * part // parts for part in (number % parts, number % parts + 1))
        return _Plan(number, corpus, start + first, start + last)

    def _batch_size(self, corpus: int) -> int:
        return self._corpora[corpus].batch_size or self._config.batch_size

    def _share(self, plan: _Plan) -> range:
        """Return this process's share; it may be empty."""
        size = plan.stop - plan.start
        first, last = (size * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return range(plan.start + first, plan.start + last)

    def _task(self, corpus: int, number: int) -> Task:
        epoch, position = divmod(number, self._sizes[corpus])
        if corpus not in self._orders or self._orders[corpus][0] != epoch:
            source, config = self._corpora[corpus].source, self._config
            order = GlobalOrder(
                source.shard_sizes, source.fingerprint, config.seed, epoch, shuffle=config.shuffle
            )
            self._orders[corpus] = (epoch, order)
        return Task(corpus, epoch, position, *self._orders[corpus][1][position])

    def _batch(self, plan: _Plan, tasks: list[Task], results: list[Result]) -> ClipBatch:
        if self._world_size > 1:  # those that heard of each other have stopped together before this
            self._check_budgets()
        corpus, tally = self._corpora[plan.corpus], self.tallies[plan.corpus]
        clips: list[Clip] = []
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, Failure):
                self._reject(task, result)
            else:
                tally.bad_in_a_row = 0
                clips.extend(result)
        repeats = self._config.repeats
        tally.seen += len(clips) // repeats
        if self._config.fill and len(clips) < len(tasks) * repeats:
            clips = clips or self._stand_in(tasks[-1])
            healthy = len(clips)
            clips = [clips[number % healthy] for number in range(len(tasks) * repeats)]
        rejected = tuple(self._untold)
        self._untold.clear()
        return stack_clips(
            clips,
            fitting(corpus, self._preprocessing),
            corpus=corpus.name,
            consumed=plan.number + 1,
            epoch=plan.start // self._sizes[plan.corpus],
            offset=(self._share(plan).start - plan.start) * repeats,
            global_size=(plan.stop - plan.start) * repeats,
            rejected=rejected,
        )

    def _stand_in(self, task: Task) -> list[Clip]:
        """Return the next sample of the epoch that can be read: the same one after any stop."""
        preparation = Preparation(self._corpora, self._preprocessing, self._config)
        size = self._sizes[task.corpus]
        for step in range(1, min(size, _MOST_BAD_IN_A_ROW)):
            position = (task.position + step) % size
            found = preparation(self._task(task.corpus, task.epoch * size + position))
            if isinstance(found, list):
                return found
        raise DataError(
            f"{_called(self._corpora[task.corpus].name)}none of {size} samples can be read", "too_many_bad"
        )

    def _recall(self, start: int, num_epochs: int | None) -> None:
        """Read the list of an earlier run; its last line may be torn."""
        if self._quarantine is None or not self._quarantine.exists():
            return
        update, part = divmod(start, self._config.parts)
        done = [count * self._batch_size(c) for c, count in enumerate(self._turns.counts(update))]
        if part:
            now = self._plan(start, num_epochs)
            done[now.corpus] = now.start
        numbers = {corpus.name: number for number, corpus in enumerate(self._corpora)}
        text = self._quarantine.read_text(encoding="utf-8")
        complete, _, torn = text.rpartition("\n")
        for line in complete.splitlines():
            row = json.loads(line)
            corpus, (shard, number) = numbers[row["corpus"]], row["place"]
            self._listed.add((corpus, row["epoch"], row["position"]))
            if row["epoch"] * self._sizes[corpus] + row["position"] < done[corpus]:
                self._count_place(corpus, shard, number)
        if torn:
            write_atomically(self._quarantine, complete + "\n" if complete else "")

    def _reject(self, task: Task, failure: Failure) -> None:
        """Note a sample that cannot be used; stop once there are too many."""
        tally, corpus = self.tallies[task.corpus], self._corpora[task.corpus]
        tally.rejected[failure.reason] += 1
        self._count_place(task.corpus, task.shard, task.number)
        tally.bad_in_a_row += 1
        tally.last = failure.detail
        visit = (task.corpus, task.epoch, task.position)
        if self._quarantine is not None and visit not in self._listed:
            place = corpus.source.locate(task.shard, task.number)
            line = {
                **place,
                "corpus": corpus.name,
                "place": [task.shard, task.number],
                "epoch": task.epoch,
                "position": task.position,
                **failure._asdict(),
            }
            with self._quarantine.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            self._listed.add(visit)
        if self._world_size == 1:
            self._check_budgets()

    def _count_place(self, corpus: int, shard: int, number: int) -> None:
        if (shard, number) not in self.tallies[corpus].bad_places:
            self.tallies[corpus].bad_places.add((shard, number))
            self._untold.append((corpus, shard, number))

    def _check_budgets(self) -> None:
        for corpus, size, tally in zip(self._corpora, self._sizes, self.tallies, strict=True):
            bad, allowed = len(tally.bad_places), self._config.max_bad_fraction * size
            if bad > allowed or tally.bad_in_a_row >= _MOST_BAD_IN_A_ROW:
                reasons = ", ".join(f"{reason} {count}" for reason, count in tally.rejected.most_common())
                raise DataError(
                    f"{_called(corpus.name)}{bad} of {size} samples cannot be used "
                    f"({reasons or 'elsewhere'}), at most {int(allowed)} are allowed; last: "
                    f"{tally.last or 'elsewhere'}; run vlm data verify, or raise max_bad_fraction",
                    "too_many_bad",
                )


def _called(name: str) -> str:
    return f"corpus {name!r}: " if name else ""
