"""Who would wait too long is refused at once: at a pace of a clock that only the calls turn."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from vlm.errors import BusyError
from vlm.serving import app as application
from vlm.serving.transport.admission import Gate

CALL_S = 0.25


class Clock:
    """Stands still unless a call takes its time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def work(self) -> str:
        self.now_s += CALL_S
        return "done"


async def fill(gate: Gate, function, count: int) -> tuple[list[asyncio.Task], int]:
    """Ask so often; return who is in line, and how many were refused."""
    tasks = [asyncio.create_task(gate.run(function)) for _ in range(count)]
    await asyncio.sleep(0)
    while any(not task.done() for task in tasks) and sum(task.done() for task in tasks) + gate.depth < count:
        await asyncio.sleep(0.001)
    refused = [task for task in tasks if task.done() and isinstance(task.exception(), BusyError)]
    return [task for task in tasks if task not in refused], len(refused)


async def overloaded(max_wait_s: float | None) -> tuple[int, int, int]:
    """Return how many of 100 were let in at a known pace, and of 3 that came when the line was gone."""
    clock, release = Clock(), threading.Event()
    gate = Gate("working", 1, 64, 30.0, max_wait_s, clock)
    try:
        for _ in range(200):  # one after another, so that the pace is what a call takes
            assert await gate.run(clock.work) == "done"
        assert gate.expected_s == pytest.approx(CALL_S, rel=1e-6)

        def held() -> str:
            release.wait()
            return clock.work()

        waiting, refused = await fill(gate, held, 100)
        begun = clock.now_s
        release.set()
        assert await asyncio.gather(*waiting) == ["done"] * len(waiting)
        longest = clock.now_s - begun
        assert max_wait_s is None or longest <= max_wait_s
        # a line that is gone lets everybody in again, whatever came before
        after = [await gate.run(clock.work) for _ in range(3)]
        return len(waiting), refused, len(after)
    finally:
        release.set()
        gate.close()


def test_the_line_is_as_long_as_can_be_answered_in_time() -> None:
    assert asyncio.run(overloaded(2.0)) == (8, 92, 3)
    assert asyncio.run(overloaded(4.0)) == (16, 84, 3)


def test_without_a_limit_of_time_the_places_alone_count() -> None:
    assert asyncio.run(overloaded(None)) == (65, 35, 3)


def test_a_few_may_wait_however_slow_calls_are() -> None:
    async def slow() -> tuple[int, int]:
        clock, release = Clock(), threading.Event()
        gate = Gate("working", 1, 64, 30.0, 0.001, clock)
        try:
            for _ in range(20):
                await gate.run(clock.work)
            waiting, refused = await fill(gate, release.wait, 20)
            release.set()
            await asyncio.gather(*waiting)
            return len(waiting), refused
        finally:
            release.set()
            gate.close()

    assert asyncio.run(slow()) == (5, 15)


def test_who_gives_up_in_line_does_not_change_the_pace() -> None:
    async def given_up() -> float:
        clock, release = Clock(), threading.Event()
        gate = Gate("working", 1, 64, 30.0, 1.0, clock)
        try:
            for _ in range(200):
                await gate.run(clock.work)
            waiting, _ = await fill(gate, release.wait, 4)
            for task in waiting[1:]:
                task.cancel()
            await asyncio.gather(*waiting[1:], return_exceptions=True)
            assert gate.depth == 1
            return gate.expected_s / 2
        finally:
            release.set()
            gate.close()

    assert asyncio.run(given_up()) == pytest.approx(CALL_S, rel=1e-6)


def test_refusals_are_told_after_a_pause_but_only_so_many_wait(monkeypatch) -> None:
    async def full(scope, receive, send) -> None:
        raise BusyError("the server is busy")

    async def refusals() -> list[int]:
        explainer, told, held = application.Explainer(full), [], asyncio.Event()
        monkeypatch.setattr(application, "_MOST_PAUSED", 2)
        monkeypatch.setattr(application, "asyncio", SimpleNamespace(sleep=lambda _: held.wait()))

        def ask(number: int) -> asyncio.Task:
            async def send(message) -> None:
                if message["type"] == "http.response.start":
                    told.append((number, message["status"]))

            return asyncio.create_task(explainer({"type": "http"}, None, send))

        first = [ask(number) for number in range(4)]
        await asyncio.gather(*first[2:])
        assert told == [(2, 503), (3, 503)]
        held.set()
        await asyncio.gather(*first)
        await ask(4)  # places are given back
        return [number for number, _ in told]

    assert asyncio.run(refusals()) == [2, 3, 0, 1, 4]


class TestACallFromAnotherGate:
    """What is let in at one gate needs the thread of another."""

    def test_runs_in_that_thread_and_is_never_refused(self) -> None:
        inner, outer = Gate("model", 1, 0, 30.0), Gate("decoding", 3, 0, 30.0)
        release, threads = threading.Event(), []

        def work() -> str:
            threads.append(threading.current_thread().name)
            return "done"

        def nested() -> str:
            # in its own thread it runs at once, where waiting would never end
            return inner.run_within(lambda: inner.run_within(work))

        async def scene() -> list[str]:
            blocked = asyncio.create_task(inner.run(release.wait, 30))
            while not inner.depth:
                await asyncio.sleep(0.01)
            with pytest.raises(BusyError):
                await inner.run(work)
            calls = [asyncio.create_task(outer.run(nested)) for _ in range(3)]
            while inner.depth < 4:
                await asyncio.sleep(0.01)
            assert not threads
            release.set()
            await blocked
            return await asyncio.gather(*calls)

        assert asyncio.run(scene()) == ["done"] * 3
        assert {name.rpartition("_")[0] for name in threads} == {"vlm-model"} and inner.depth == 0
        inner.close(), outer.close()

    def test_its_own_errors_come_back_and_waiting_ends(self) -> None:
        gate, release = Gate("model", 1, 4, 0.2), threading.Event()

        def fail() -> None:
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            gate.run_within(fail)
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(gate.run_within, lambda: release.wait(30))
            with pytest.raises(BusyError, match="longer than 0.2 s"):
                blocked.result()
            # what has begun keeps its place; who waits behind it gives up, too
            with pytest.raises(BusyError, match="longer than 0.2 s"):
                gate.run_within(lambda: None)
            assert gate.depth == 1
            release.set()
        gate.close()
        with pytest.raises(BusyError, match="shutting down"):
            gate.run_within(lambda: None)
