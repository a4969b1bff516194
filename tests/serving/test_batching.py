"""Searches that share a pass get what they would get alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vlm.retrieval.backends import ExactBackend
from vlm.serving.batching import BatchingBackend


class Rows:
    """Vectors in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.key = values.astype(np.float16), "rows"
        self.num_rows, self.dim = values.shape

    def blocks(self, max_rows):
        for first in range(0, self.num_rows, max_rows):
            yield first, self.values[first : first + max_rows]

    def gather(self, rows):
        return self.values[rows]


class Slow:
    """Counts and delays the passes of another backend."""

    name = "slow"

    def __init__(self, inner, error: Exception | None = None, shares_passes: bool = True) -> None:
        self.inner, self.error, self.sizes = inner, error, []
        self.shares_passes = shares_passes

    def search(self, queries, top_k, allowed=None):
        self.sizes.append(len(queries))
        time.sleep(0.05)
        if self.error is not None:
            raise self.error
        return self.inner.search(queries, top_k, allowed)


@pytest.fixture
def exact():
    return ExactBackend(Rows(np.random.default_rng(5).normal(size=(400, 16))))


def test_each_gets_its_own_answer_and_passes_are_shared(exact) -> None:
    slow = Slow(exact)
    batching = BatchingBackend(slow)
    queries = np.random.default_rng(6).normal(size=(60, 16)).astype(np.float32)
    wanted = [1 + n % 9 for n in range(60)]
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda n: batching.search(queries[n : n + 1], wanted[n]), range(60)))
    for n, (scores, rows) in enumerate(found):
        expected = exact.search(queries[n : n + 1], wanted[n])
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_array_equal(scores, expected[0])
    assert sum(slow.sizes) == 60 and len(slow.sizes) < 20


def test_filtered_searches_keep_their_filter(exact) -> None:
    allowed = np.zeros(400, bool)
    allowed[7:9] = True
    _, rows = BatchingBackend(exact).search(np.ones((1, 16), np.float32), 5, allowed)
    assert set(rows[0].tolist()) == {7, 8, -1}


def test_an_error_reaches_everybody_and_ends_there(exact) -> None:
    slow = Slow(exact, ValueError("broken"))
    batching, failures = BatchingBackend(slow), []

    def ask() -> None:
        try:
            batching.search(np.ones((1, 16), np.float32), 3)
        except ValueError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == ["broken"] * 6
    slow.error = None
    assert batching.search(np.ones((1, 16), np.float32), 3)[1].shape == (1, 3)


def test_what_shares_nothing_goes_alone_and_no_more_at_once_than_there_are_cores(exact, monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    now, most, lock = [0], [0], threading.Lock()

    class Counting(Slow):
        def search(self, queries, top_k, allowed=None):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            found = super().search(queries, top_k, allowed)
            with lock:
                now[0] -= 1
            return found

    slow = Counting(exact, shares_passes=False)
    batching = BatchingBackend(slow)
    queries = np.random.default_rng(6).normal(size=(12, 16)).astype(np.float32)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda n: batching.search(queries[n : n + 1], 4), range(12)))
    for n, (scores, rows) in enumerate(found):
        np.testing.assert_array_equal(rows, exact.search(queries[n : n + 1], 4)[1])
        np.testing.assert_array_equal(scores, exact.search(queries[n : n + 1], 4)[0])
    assert slow.sizes == [1] * 12 and 1 < most[0] <= 3
