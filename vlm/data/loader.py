"""The pipeline: order → this process's share → load and prepare in workers → batches, in that order.

The only state is the number of batches that were handed out; worker count, worker kind and prefetching never
change what a batch holds, and the split over processes never changes what a global batch holds.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vlm.data.collate import BadPlace, Clip, ClipBatch, Report, Visit, stack_clips
from vlm.data.mixture import Corpus, GlobalOrder, Turns
from vlm.data.preparation import Failure, LoaderConfig, Preparation, Result, Task, fitting, start_workers
from vlm.data.shards.layout import write_atomically
from vlm.data.sources import SampleSource
from vlm.errors import DataError, IntegrityError, VlmError
from vlm.types import Preprocessing

_MOST_BAD_IN_A_ROW = 100
_REPORT = "this is a mistake of the loader and no damage of the data: report it with the run's config"


class Account:
    """Which samples of a corpus were visited, by all processes: each must be, once in a pass.

    Args:
        shard_sizes: Of the corpus.
        start: Samples of its passes that were visited before, by a run that was stopped.
    """

    def __init__(self, shard_sizes: Sequence[int], start: int) -> None:
        self._firsts = list(itertools.accumulate(shard_sizes, initial=0))
        self._size = self._firsts[-1]
        self._begun, self._before = divmod(start, self._size)
        self._marks: dict[int, bytearray] = {}
        self._counts: Counter[int] = Counter({self._begun: self._before})

    def add(self, visit: Visit) -> None:
        """Note a visit.

        Raises:
            IntegrityError: The sample was visited in this pass before.
        """
        marks = self._marks.setdefault(visit.epoch, bytearray(self._size // 8 + 1))
        place, bit = divmod(self._firsts[visit.shard] + visit.number, 8)
        if marks[place] >> bit & 1:
            raise IntegrityError(
                f"epoch {visit.epoch}: sample {visit.number} of shard {visit.shard} came twice; {_REPORT}"
            )
        marks[place] |= 1 << bit
        self._counts[visit.epoch] += 1

    def close(self, stop: int) -> None:
        """Check the passes that are over once ``stop`` samples were visited.

        Raises:
            IntegrityError: A sample was neither seen nor rejected.
        """
        while stop >= (self._begun + 1) * self._size:
            missing = self._size - self._counts.pop(self._begun, 0)
            if missing:
                raise IntegrityError(
                    f"epoch {self._begun}: {missing} of {self._size} samples were neither seen nor rejected; "
                    f"{_REPORT}"
                )
            self._marks.pop(self._begun, None)
            self._begun += 1


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
            IntegrityError: At the end of a pass a sample was neither seen nor rejected, or one came twice.
            VlmError: A worker process died.
        """
        end = None if num_epochs is None else self._turns.before(num_epochs) * self._config.parts
        done = self._done_before(start, num_epochs)
        self._recall(done)
        self._accounts = [
            Account(corpus.source.shard_sizes, count)
            for corpus, count in zip(self._corpora, done, strict=True)
        ]
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

    def settle(self, reports: Sequence[Report]) -> None:
        """Account for a global batch; a process that is alone has done so before it gives the batch away.

        Several processes call it with everybody's reports (`ClipBatch.report`), in the order of their ranks,
        after each batch, and so stop at the same one.

        Raises:
            DataError: Too many samples were rejected (``too_many_bad``).
            IntegrityError: A sample came twice in a pass, or at its end not at all.
        """
        if self._world_size > 1:
            self._settle(reports)

    def _settle(self, reports: Sequence[Report]) -> None:
        for report in reports:
            tally, account = self.tallies[report.corpus], self._accounts[report.corpus]
            for corpus, shard, number in report.bad:
                self.tallies[corpus].bad_places.add((shard, number))
            for visit in report.visits:
                account.add(visit)
                tally.bad_in_a_row = 0 if visit.is_seen else tally.bad_in_a_row + 1
                if tally.bad_in_a_row == _MOST_BAD_IN_A_ROW:
                    raise DataError(
                        f"{_called(self._corpora[report.corpus].name)}{_MOST_BAD_IN_A_ROW} samples in a row "
                        f"cannot be used; last: {tally.last or 'elsewhere'}; run vlm data verify",
                        "too_many_bad",
                    )
        self._check_budgets()
        for report in reports[-1:]:
            self._accounts[report.corpus].close(report.stop)

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
        visits = []
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, Failure):
                self._reject(task, result)
            else:
                clips.extend(result)
            visits.append(Visit(task.epoch, task.shard, task.number, isinstance(result, list)))
        report = Report(plan.corpus, plan.stop, tuple(visits), tuple(self._untold))
        self._untold.clear()
        if self._world_size == 1:
            self._settle([report])
        repeats = self._config.repeats
        tally.seen += len(clips) // repeats
        if self._config.fill and len(clips) < len(tasks) * repeats:
            clips = clips or self._stand_in(tasks[-1])
            healthy = len(clips)
            clips = [clips[number % healthy] for number in range(len(tasks) * repeats)]
        return stack_clips(
            clips,
            fitting(corpus, self._preprocessing),
            corpus=corpus.name,
            consumed=plan.number + 1,
            epoch=plan.start // self._sizes[plan.corpus],
            offset=(self._share(plan).start - plan.start) * repeats,
            global_size=(plan.stop - plan.start) * repeats,
            report=report,
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

    def _done_before(self, number: int, num_epochs: int | None) -> list[int]:
        """Return how many samples of each corpus come before a part of an update."""
        update, part = divmod(number, self._config.parts)
        done = [count * self._batch_size(c) for c, count in enumerate(self._turns.counts(update))]
        if part:
            now = self._plan(number, num_epochs)
            done[now.corpus] = now.start
        return done

    def _recall(self, done: list[int]) -> None:
        """Read the list of an earlier run, of whose corpora so much is done; its last line may be torn."""
        if self._quarantine is None or not self._quarantine.exists():
            return
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
            if bad > allowed:
                reasons = ", ".join(f"{reason} {count}" for reason, count in tally.rejected.most_common())
                raise DataError(
                    f"{_called(corpus.name)}{bad} of {size} samples cannot be used "
                    f"({reasons or 'elsewhere'}), at most {int(allowed)} are allowed; last: "
                    f"{tally.last or 'elsewhere'}; run vlm data verify, or raise max_bad_fraction",
                    "too_many_bad",
                )


def _called(name: str) -> str:
    return f"corpus {name!r}: " if name else ""
