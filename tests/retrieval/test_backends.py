from __future__ import annotations

import json

import numpy as np
import pytest

from vlm.errors import InvalidInput, MissingExtra
from vlm.retrieval.backends import ExactBackend, open_backend


class Rows:
    """Vectors in memory, in blocks of odd sizes as parts are."""

    def __init__(self, vectors: np.ndarray, key: str = "k") -> None:
        self.vectors, self.key = vectors.astype(np.float16), key
        self.num_rows, self.dim = vectors.shape
        self.prefixes: dict[int, str] = {}

    def prefix_key(self, num_rows):
        return self.key if num_rows == self.num_rows else self.prefixes.get(num_rows)

    def blocks(self, max_rows, first=0):
        for start in range(first, self.num_rows, min(max_rows, 37)):
            yield start, self.vectors[start : start + min(max_rows, 37)]

    def gather(self, rows):
        return self.vectors[rows]


@pytest.fixture(params=["exact", "faiss"])
def make_backend(request, tmp_path):
    if request.param == "faiss":
        pytest.importorskip("faiss")

    def make(rows: Rows):
        backend = open_backend(request.param, rows, tmp_path / "ann")
        assert backend.name == request.param
        return backend

    return make


def truth(rows: Rows, query: np.ndarray, top_k: int, allowed=None) -> tuple[list[float], list[int]]:
    """The definition, one Python number at a time."""
    scored = []
    for row in range(rows.num_rows):
        if allowed is None or allowed[row]:
            score = np.float32(np.sum(rows.vectors[row].astype(np.float64) * query.astype(np.float64)))
            scored.append((-score, row))
    best = sorted(scored)[:top_k]
    return [float(-score) for score, _ in best], [row for _, row in best]


@pytest.mark.parametrize(("count", "dim", "top_k"), [(1, 3, 5), (36, 8, 4), (500, 64, 10), (500, 64, 500)])
def test_equals_the_definition(make_backend, count, dim, top_k) -> None:
    rng = np.random.default_rng(count)
    rows = Rows(rng.standard_normal((count, dim)))
    queries = rng.standard_normal((3, dim)).astype(np.float32)
    scores, found = make_backend(rows).search(queries, top_k)
    for query in range(3):
        expected = truth(rows, queries[query], top_k)
        n = len(expected[1])
        assert found[query, :n].tolist() == expected[1]
        assert scores[query, :n].tolist() == expected[0]
        assert (found[query, n:] == -1).all() and np.isneginf(scores[query, n:]).all()


def test_ties_rank_by_row(make_backend) -> None:
    rng = np.random.default_rng(0)
    rows = Rows(np.tile(rng.standard_normal((3, 24)), (200, 1)))
    query = rng.standard_normal((1, 24)).astype(np.float32)
    _, found = make_backend(rows).search(query, 50)
    best = int(np.argmax(rows.vectors[:3].astype(np.float64) @ query[0]))
    assert found[0].tolist() == list(range(best, 150, 3))


def test_near_ties_beyond_float32_are_ordered(make_backend) -> None:
    # sums that differ by less than a float32 product's rounding, in a scrambled order
    rng = np.random.default_rng(1)
    base = rng.standard_normal(256)
    vectors = np.stack([base[rng.permutation(256)] for _ in range(300)])
    rows, query = Rows(vectors), np.ones((1, 256), np.float32)
    scores, found = make_backend(rows).search(query, 7)
    assert (scores[0].tolist(), found[0].tolist()) == truth(rows, query[0], 7)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_filters_are_applied_before_the_cut(make_backend, share) -> None:
    rng = np.random.default_rng(2)
    rows = Rows(rng.standard_normal((400, 16)))
    query = rng.standard_normal((1, 16)).astype(np.float32)
    allowed = rng.random(400) < share
    scores, found = make_backend(rows).search(query, 10, allowed)
    expected = truth(rows, query[0], 10, allowed)
    n = len(expected[1])
    assert n == min(10, allowed.sum())
    assert (scores[0, :n].tolist(), found[0, :n].tolist()) == expected
    assert (found[0, n:] == -1).all()


def test_no_rows(make_backend) -> None:
    scores, found = make_backend(Rows(np.zeros((0, 4)))).search(np.ones((2, 4), np.float32), 3)
    assert (found == -1).all() and np.isneginf(scores).all()


def test_wrong_queries(make_backend) -> None:
    backend = make_backend(Rows(np.ones((2, 4))))
    for queries, top_k in (
        (np.ones(4), 1),
        (np.ones((1, 5)), 1),
        (np.full((1, 4), np.nan), 1),
        (np.ones((1, 4)), 0),
    ):
        with pytest.raises(ValueError, match=r"queries must|top_k must"):
            backend.search(queries, top_k)


def test_unknown_backend(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="expected backend auto, exact or faiss, got 'hnsw'"):
        open_backend("hnsw", Rows(np.ones((1, 2))), tmp_path)


class TestFaissCache:
    """What lies in ann/ may be old, torn or flipped; the hits never show it."""

    @pytest.fixture
    def rows(self):
        pytest.importorskip("faiss")
        return Rows(np.random.default_rng(3).standard_normal((60, 8)))

    def check(self, rows: Rows, cache) -> None:
        query = np.random.default_rng(4).standard_normal((1, 8)).astype(np.float32)
        expected = ExactBackend(rows).search(query, 9)
        for mine, exact in zip(open_backend("faiss", rows, cache).search(query, 9), expected, strict=True):
            assert mine.tolist() == exact.tolist()

    def test_is_used_and_then_matches_its_label(self, rows, tmp_path) -> None:
        self.check(rows, tmp_path / "ann")
        before = (tmp_path / "ann" / "structure.faiss").stat().st_mtime_ns
        self.check(rows, tmp_path / "ann")
        assert (tmp_path / "ann" / "structure.faiss").stat().st_mtime_ns == before
        _, label = (tmp_path / "ann" / "structure.json").read_text().split("\n")
        assert json.loads(label)["key"] == "k"

    @pytest.mark.parametrize("name", ["structure.faiss", "structure.json"])
    def test_a_flipped_bit_anywhere_is_rebuilt(self, rows, tmp_path, name) -> None:
        self.check(rows, tmp_path / "ann")
        path = tmp_path / "ann" / name
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 25)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            self.check(rows, tmp_path / "ann")

    @pytest.mark.parametrize("keep", [0, 1, 50, -1])
    def test_a_torn_file_is_rebuilt(self, rows, tmp_path, keep) -> None:
        self.check(rows, tmp_path / "ann")
        path = tmp_path / "ann" / "structure.faiss"
        path.write_bytes(path.read_bytes()[:keep])
        self.check(rows, tmp_path / "ann")

    def test_other_vectors_are_not_searched_with_it(self, rows, tmp_path) -> None:
        self.check(rows, tmp_path / "ann")
        self.check(Rows(rows.vectors[::-1].astype(np.float32), key="other"), tmp_path / "ann")

    def test_a_small_addition_does_not_write_it_again(self, rows, tmp_path) -> None:
        self.check(rows, tmp_path / "ann")
        path = tmp_path / "ann" / "structure.faiss"
        before = path.read_bytes()
        rng = np.random.default_rng(6)
        for count, is_kept in ((67, True), (70, False)):
            more = np.concatenate([rows.vectors, rng.standard_normal((count - 60, 8)).astype(np.float16)])
            grown = Rows(more, key=f"k{count}")
            grown.prefixes = {60: "k"}
            self.check(grown, tmp_path / "ann")
            assert (path.read_bytes() == before) == is_kept
        # vectors that begin otherwise are not searched with it
        self.check(Rows(np.roll(more, 1, axis=0), key="rolled"), tmp_path / "ann")

    def test_a_place_that_cannot_be_written_is_no_obstacle(self, rows, tmp_path) -> None:
        (tmp_path / "ann").write_text("a file where the folder should be")
        self.check(rows, tmp_path / "ann")


def test_a_store_without_lancedb_names_the_extra(tmp_path, monkeypatch):
    from vlm.retrieval.store.tables import Tables

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'videomamba-vlm\[lance\]'"):
        Tables(str(tmp_path))
