"""Structures made with a GPU's help equal the CPU's. The GPU is played: it records, the CPU computes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("faiss")

import faiss

from tests.retrieval.test_structures import Rows, texts
from vlm.cli.index import _describe_structure
from vlm.retrieval.backends import cache, structured
from vlm.retrieval.backends.exact import ExactBackend
from vlm.retrieval.backends.faiss import count_gpus
from vlm.retrieval.backends.structured import FaissBackend


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that records what it was given; ``failing[name] = n`` lets the nth call fail."""
    calls = SimpleNamespace(moved=[], lent=[], products=0, failing={})

    def check(name: str) -> None:
        left = calls.failing.get(name)
        if left is not None:
            calls.failing[name] = left - 1
            if left <= 1:
                raise RuntimeError("Error in allocMemory: out of memory\nat GpuResources.cpp:12")

    def move(resources, device, index):
        assert (resources, device) == ("resources", 0)
        check("move")
        calls.moved.append((index.metric_type, index.ntotal))
        calls.lent.append(faiss.clone_index(index))
        return calls.lent[-1]

    def product(resources, queries, vectors, metric, device):
        assert metric == faiss.METRIC_INNER_PRODUCT and device == 0
        assert queries.dtype == vectors.dtype == np.float32
        check("product")
        calls.products += 1
        return queries @ vectors.T

    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
    monkeypatch.setattr(faiss, "pairwise_distance_gpu", product)
    return calls


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(structured, "SCAN_ROWS", 20)
    return Rows()


def made(rows, folder) -> FaissBackend:
    return FaissBackend(rows, folder, texts=lambda: texts(rows), kind="lists")


@pytest.fixture
def truth(rows, tmp_path):
    """What the CPU alone makes: bytes, label, hits."""
    assert count_gpus() == 0
    backend = made(rows, tmp_path / "cpu")
    assert backend.label.made_on == "cpu"
    return backend


def same(mine: FaissBackend, truth: FaissBackend, rows) -> None:
    assert mine._structure.pack() == truth._structure.pack()
    assert (mine.plan, mine.label.recalls) == (truth.plan, truth.label.recalls)
    for allowed in (None, np.arange(rows.num_rows) % 3 == 0):
        for ours, theirs in zip(
            mine.search(texts(rows), 10, allowed), truth.search(texts(rows), 10, allowed), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_a_gpu_helps_and_the_structure_is_the_cpus(truth, rows, tmp_path, gpu) -> None:
    mine = made(rows, tmp_path / "gpu")
    # the centres are found there from an empty index, then every block of vectors finds its own there
    num_lists = mine.plan.num_lists
    assert gpu.moved[0] == (faiss.METRIC_INNER_PRODUCT, 0)
    assert set(gpu.moved[1:]) == {(faiss.METRIC_INNER_PRODUCT, num_lists)}
    assert len(gpu.moved) == 1 + rows.num_rows // 500 and gpu.products == 2 * rows.num_rows // 500
    assert mine.label.made_on == "gpu" and cache.stated(tmp_path / "gpu")["made_on"] == "gpu"
    same(mine, truth, rows)
    # nothing of the GPU is kept
    lists = mine._structure._index
    assert lists.clustering_index is None
    assert int(lists.quantizer.this) not in {int(index.this) for index in gpu.lent}
    # it is read, copied and searched where there is none
    gpu.moved.clear()
    again = made(rows, tmp_path / "gpu")
    assert gpu.moved == [] and (again.label.made_on, again.plan) == ("gpu", mine.plan)
    same(again, truth, rows)
    told = _describe_structure(cache.stated(tmp_path / "gpu"), rows.num_rows)
    assert told.endswith("measured against exact search, made on the GPU")
    assert "made on" not in _describe_structure(cache.stated(tmp_path / "cpu"), rows.num_rows)


@pytest.mark.parametrize("failing", [{"move": 1}, {"move": 3}, {"product": 1}, {"product": 4}])
def test_the_cpu_goes_on_where_the_gpu_fails_and_it_is_said(failing, truth, rows, tmp_path, gpu) -> None:
    gpu.failing.update(failing)
    mine = made(rows, tmp_path / "gpu")
    same(mine, truth, rows)
    (left,) = gpu.failing.values()
    assert left == 0  # it failed once, and was not asked again
    why = "cpu, since the GPU failed: Error in allocMemory: out of memory"
    assert mine.label.made_on == why
    told = _describe_structure(cache.stated(tmp_path / "gpu"), rows.num_rows)
    assert "made on the cpu, since the GPU failed: Error in allocMemory" in told


def test_rows_that_were_half_added_are_not_added_again(gpu) -> None:
    class Half:
        ntotal = 0
        quantizer = faiss.IndexFlatIP(4)

        def add(self, vectors):
            self.ntotal += 1
            raise RuntimeError("later than promised")

    structure = structured.Structure(Half(), SimpleNamespace(kind="lists"))
    with pytest.raises(RuntimeError, match="later than promised"):
        structure.add(np.zeros((3, 4), np.float32), structured.Gpu())


def test_small_collections_and_additions_need_no_gpu(rows, tmp_path, gpu) -> None:
    backend = FaissBackend(rows, tmp_path / "ann", kind="flat")
    assert gpu.moved == [] and backend.label.made_on == "cpu"


def test_a_product_that_is_off_as_float32_is_changes_no_hit(rows) -> None:
    """What a GPU sums in another order."""
    rng = np.random.default_rng(0)

    def product(queries, values):
        exact = queries @ values.T
        scale = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(values, axis=1)
        return (exact + scale * 6e-8 * rng.choice([-1, 1], exact.shape)).astype(np.float32)

    queries = texts(rows)
    for mine, truth in zip(
        ExactBackend(rows, product).search(queries, 10), ExactBackend(rows).search(queries, 10), strict=True
    ):
        np.testing.assert_array_equal(mine, truth)
