"""Structures that may miss hits: what they miss is measured and stated, and filters never cost a hit."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("faiss")

from vlm.evaluation.tradeoff.stored import SyntheticModel, store
from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
from vlm.retrieval.backends import ExactBackend, cache, plan, structured
from vlm.retrieval.backends.calibration import TARGET_RECALL, recall_of
from vlm.retrieval.backends.structured import FaissBackend
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.searcher import Searcher

VECTORS = SyntheticVectors(32)


class Rows:
    """Clustered vectors in memory."""

    def __init__(self, count: int = 3000, dim: int = 32, key: str = "k") -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((40, dim))
        vectors = centres[rng.integers(40, size=count)] + 0.6 * rng.standard_normal((count, dim))
        self.vectors, self.key, self.num_rows, self.dim = vectors.astype(np.float16), key, count, dim

    def prefix_key(self, num_rows):
        return {self.num_rows: self.key, 3000: "k"}.get(num_rows)

    def blocks(self, max_rows, first=0):
        for start in range(first, self.num_rows, 500):
            yield start, self.vectors[start : start + 500]

    def gather(self, rows):
        return self.vectors[rows]


@pytest.fixture
def narrow(monkeypatch):
    """Small collections are searched as large ones are."""
    monkeypatch.setattr(structured, "SCAN_ROWS", 20)
    monkeypatch.setattr(structured, "_CANDIDATES_PER_HIT", 1)


def texts(rows: Rows) -> np.ndarray:
    """Queries that lie elsewhere than what is stored."""
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((60, rows.dim)) * 2 + 1.0
    return (rows.vectors[rng.integers(rows.num_rows, size=60)] + noise).astype(np.float32)


def recall(backend, rows, queries, allowed=None) -> float:
    """Share of the best ten, by rows; the truth is the exact backend's."""
    found = backend.search(queries, 10, allowed)[1]
    truth = ExactBackend(rows).search(queries, 10, allowed)[1]
    return np.mean([len(set(a) & set(b)) / len(set(b)) for a, b in zip(found, truth, strict=True)])


def test_sizes_choose_kinds() -> None:
    assert [plan.kind_for(n) for n in (0, 50_000, 50_001)] == ["flat", "flat", "lists"]
    million = plan.plan_for(1_000_000, 512)
    assert (million.kind, million.num_lists, million.num_subvectors) == ("lists", 1024, 128)
    assert plan.plan_for(1_000_000, 768).num_subvectors == 128
    # a length that cannot be cut stays whole, and one list is a list
    assert plan.plan_for(1, 131, "lists") == plan.Plan(kind="lists", num_lists=1, num_subvectors=1)


class TestApproximate:
    def test_finds_what_it_states(self, narrow, tmp_path) -> None:
        rows = Rows()
        backend = FaissBackend(rows, tmp_path / "ann", texts=lambda: texts(rows), kind="lists")
        stated = {r.queries: r.recall_at_10 for r in backend.label.recalls}
        assert set(stated) == {"stored", "texts"} and min(stated.values()) >= TARGET_RECALL
        assert recall(backend, rows, texts(rows)) == pytest.approx(stated["texts"], abs=0.005)
        assert cache.stated(tmp_path / "ann")["recall_at_10"] == stated
        # other queries of the same sort fare as was stated
        others = (
            texts(rows) + np.random.default_rng(8).standard_normal((60, rows.dim)).astype(np.float32) * 0.3
        )
        assert recall(backend, rows, others) >= 0.93

    def test_scores_are_the_definition(self, narrow, tmp_path) -> None:
        rows = Rows()
        backend, queries = FaissBackend(rows, tmp_path / "ann", kind="lists"), texts(rows)
        scores, found = backend.search(queries, 7)
        products = rows.vectors[found].astype(np.float64) * queries[:, None].astype(np.float64)
        assert scores.tolist() == products.sum(axis=2).astype(np.float32).tolist()
        assert (np.diff(scores, axis=1) <= 0).all()

    def test_a_setting_that_looks_at_little_says_so(self, narrow, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(
            "vlm.retrieval.backends.calibration.settings_of",
            lambda mine, _: [plan.Plan(kind="lists", num_lists=mine.num_lists, breadth=1, depth=1)],
        )
        monkeypatch.setattr(structured, "_CANDIDATES_PER_HIT", 0)
        rows = Rows()
        backend = FaissBackend(rows, tmp_path / "ann", texts=lambda: texts(rows), kind="lists")
        assert {r.queries: r.recall_at_10 for r in backend.label.recalls}["texts"] < 0.5

    @pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.3, 1.0])
    def test_selective_filters_lose_nothing(self, narrow, tmp_path, share) -> None:
        rows, rng = Rows(), np.random.default_rng(3)
        backend = FaissBackend(rows, tmp_path / "ann", texts=lambda: texts(rows), kind="lists")
        allowed = rng.random(rows.num_rows) < share
        found = backend.search(texts(rows), 10, allowed)[1]
        assert allowed[found[found >= 0]].all()
        assert ((found >= 0).sum(axis=1) == min(10, allowed.sum())).all()
        assert recall(backend, rows, texts(rows), allowed) >= (1.0 if allowed.sum() <= 20 else 0.96)

    def test_what_is_allowed_may_lie_far_away(self, narrow, tmp_path) -> None:
        rows = Rows()
        backend = FaissBackend(rows, tmp_path / "ann", kind="lists")
        query = rows.vectors[:1].astype(np.float32)
        allowed = np.zeros(rows.num_rows, bool)
        allowed[np.argsort(rows.vectors.astype(np.float32) @ query[0])[:300]] = True
        assert recall(backend, rows, query, allowed) == 1.0

    def test_all_rows_can_be_asked_for(self, narrow, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(structured, "_MOST_CANDIDATES", 500)
        rows = Rows()
        backend, queries = FaissBackend(rows, tmp_path / "ann", kind="lists"), texts(rows)[:2]
        for mine, exact in zip(
            backend.search(queries, rows.num_rows),
            ExactBackend(rows).search(queries, rows.num_rows),
            strict=True,
        ):
            assert mine.tolist() == exact.tolist()

    def test_what_was_measured_without_texts_is_measured_again_with_them(self, narrow, tmp_path) -> None:
        rows, folder = Rows(), tmp_path / "ann"
        FaissBackend(rows, folder, kind="lists")
        assert set(cache.stated(folder)["recall_at_10"]) == {"stored"}
        before = cache.stated(folder)["breadth"]
        FaissBackend(rows, folder, texts=lambda: texts(rows), kind="lists")
        assert set(cache.stated(folder)["recall_at_10"]) == {"stored", "texts"}
        assert cache.stated(folder)["breadth"] > before

        def never() -> np.ndarray:
            raise AssertionError("measured already")

        FaissBackend(rows, folder, texts=never, kind="lists")

    def test_a_flipped_bit_is_rebuilt_and_named(self, narrow, tmp_path) -> None:
        rows, folder = Rows(), tmp_path / "ann"
        expected = FaissBackend(rows, folder, kind="lists").search(texts(rows), 10)
        content = (folder / "structure.faiss").read_bytes()
        for position in (3, len(content) // 2, len(content) - 1):
            flipped = content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
            (folder / "structure.faiss").write_bytes(flipped)
            assert cache.damaged(folder) == ("structure.faiss", "its content changed (checksum mismatch)")
            found = FaissBackend(rows, folder, kind="lists").search(texts(rows), 10)
            assert cache.damaged(folder) is None
            assert [part.tolist() for part in found] == [part.tolist() for part in expected]

    def test_more_rows_are_added_and_at_last_trained_anew(self, narrow, tmp_path) -> None:
        folder, calls = tmp_path / "ann", []

        def counted() -> np.ndarray:
            calls.append(1)
            return texts(Rows())

        FaissBackend(Rows(), folder, texts=counted, kind="lists")
        for count, num_calls, kept in ((3100, 1, 3000), (6000, 2, 6000), (13_000, 3, 13_000)):
            rows = Rows(count, key=f"k{count}")
            rows.vectors[:3000] = Rows().vectors
            backend = FaissBackend(rows, folder, texts=counted, kind="lists")
            assert (len(calls), cache.stated(folder)["num_rows"]) == (num_calls, kept)
            assert backend.label.num_trained == (13_000 if count == 13_000 else 3000)
            assert recall(backend, rows, texts(rows)) >= 0.9
            if count == 3100:  # what was not in the cached file is found all the same
                newest = rows.vectors[-5:].astype(np.float32)
                assert recall(backend, rows, newest) >= 0.9


def test_codes_take_at_most_80_bytes_a_vector(narrow, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(structured, "_TRAINING_ROWS", 500)
    rows = Rows(20_000, 512)
    backend = FaissBackend(rows, tmp_path / "ann", kind="lists")
    stated = cache.stated(tmp_path / "ann")
    # the centroids are shared: they weigh less the more rows there are
    centroids = backend.plan.num_lists * 512 * 4 / rows.num_rows
    codebooks = 16 * 512 * 4 / rows.num_rows
    # the codes of a list come in blocks of 32
    padding = backend.plan.num_lists * 32 * 64 / rows.num_rows
    assert 72 <= stated["bytes_per_vector"] - centroids - codebooks <= 72.5 + padding
    assert stated["bytes_per_vector"] == (tmp_path / "ann" / "structure.faiss").stat().st_size / rows.num_rows


def test_small_collections_stay_exact(tmp_path) -> None:
    backend = FaissBackend(Rows(), tmp_path / "ann")
    assert (backend.plan.kind, backend.label.recalls) == ("flat", ())
    label = json.loads((tmp_path / "ann" / "structure.json").read_text().split("\n")[1])
    assert label["plan"]["kind"] == "flat"


def test_recall_counts_ties_and_leaves_the_query_out() -> None:
    truth = np.array([[9.0, *range(8, -2, -1)]]), np.arange(11)[None]
    same_scores = np.array([[9.0, *range(8, -2, -1)]]), np.arange(20, 31)[None]
    assert recall_of(same_scores, truth, np.array([-1])) == [1.0]
    assert recall_of(truth, truth, np.array([0])) == [1.0]
    half = np.where(np.arange(11) < 6, truth[0], -np.inf), np.where(np.arange(11) < 6, truth[1], -1)
    assert recall_of(half, truth, np.array([0])) == [0.5]
    assert recall_of(half, truth, np.array([-1])) == [0.6]


class TestIndexOfManySegments:
    """A real index folder, large enough for a structure that is not exact."""

    @pytest.fixture
    def index(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan, "FLAT_ROWS", 500)
        monkeypatch.setattr(structured, "SCAN_ROWS", 20)
        return store(tmp_path / "index", VECTORS, 1500)

    def test_a_command_that_adds_trains_and_info_states(self, index, call_vlm) -> None:
        from vlm.cli.index import _conclude
        from vlm.retrieval.reports import Report

        assert index.info()["structure"] is None
        code, output, _ = call_vlm("index", "info", str(index.folder))
        assert code == 0 and "search structure: none yet" in output
        assert _conclude(index, SyntheticModel(VECTORS, 1500), Report(num_unchanged=75), True) == 0
        assert index.info()["structure"]["kind"] == "lists" and index.verify() == []
        _, output, _ = call_vlm("index", "info", str(index.folder))
        stated = index.info()["structure"]["recall_at_10"]
        assert f"recall@10 {stated['stored']:.3f} of 100 stored, {stated['texts']:.3f} of 152 texts" in output

    def test_searches_hit_what_exact_ones_do(self, index) -> None:
        model = SyntheticModel(VECTORS, 1500)
        searchers = [Searcher(index, model, backend=name) for name in ("faiss", "exact")]
        same = 0
        for vector in VECTORS.texts(40, 1500, seed=99):
            query = EncodedQuery(vector=vector)
            mine, exact = ([hit.video_id for hit in s.search(query, top_k=5)] for s in searchers)
            same += len(set(mine) & set(exact))
            # a mean needs every segment, so nothing may be missed
            means = [s.search(query, top_k=75, aggregate="mean") for s in searchers]
            assert means[0] == means[1] and len(means[0]) == 75
            where = "path like '%0000013.mp4'"
            assert searchers[0].search(query, where=where) == searchers[1].search(query, where=where)
        assert same >= 0.95 * 40 * 5

    def test_small_parts_are_read_in_large_blocks(self, index) -> None:
        vectors, expected = index.vectors(), np.concatenate(list(VECTORS.blocks(1500))).astype(np.float16)
        for max_rows, sizes in ((100, [100] * 15), (500, [500] * 3), (700, [500] * 3), (1100, [1000, 500])):
            blocks = list(vectors.blocks(max_rows))
            assert [len(block) for _, block in blocks] == sizes
            assert [first for first, _ in blocks] == np.cumsum([0, *sizes[:-1]]).tolist()
            assert np.array_equal(np.concatenate([block for _, block in blocks]), expected)
        assert [(first, len(block)) for first, block in vectors.blocks(1100, 500)] == [(500, 1000)]
        rng = np.random.default_rng(0)
        for count in (0, 3, 900):
            rows = rng.integers(0, 1500, count)
            assert np.array_equal(vectors.gather(rows), expected[rows])
