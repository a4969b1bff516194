"""`vlm eval index_tradeoff` runs, its data are what they claim, the committed figures keep the limits."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from vlm.assets import asset
from vlm.cli import main
from vlm.evaluation.tradeoff.stored import store
from vlm.evaluation.tradeoff.synthetic import BLOCK_ROWS, SEGMENTS_PER_VIDEO, SyntheticVectors

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("index_tradeoff", asset("eval/index_tradeoff.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vectors():
    return SyntheticVectors(32)


def rows_of(vectors, count):
    return np.concatenate(list(vectors.blocks(count)))


def test_runs_and_goes_on(tmp_path, capsys):
    out, work = tmp_path / "t.json", tmp_path / "work"
    command = [
        "eval",
        "index_tradeoff",
        "--dim",
        "16",
        "--queries",
        "20",
        "--work",
        str(work),
        "--out",
        str(out),
    ]
    assert main([*command, "--sizes", "300", "--rivals", "flat", "hnsw"]) == 0
    first = json.loads(out.read_text())
    figures = first["sizes"]["300"]
    assert set(figures) == {"data", "ours", "filtered", "flat", "hnsw"}
    assert figures["ours"]["recall_at_10"] == figures["flat"]["recall_at_10"] == 1.0
    assert figures["ours"]["end_to_end"]["video_recall_at_10"] == 1.0
    assert {entry["recall_at_10"] for entry in figures["filtered"].values()} == {1.0}
    assert figures["ours"]["bytes_per_vector"] == pytest.approx(64, abs=1)
    assert set(figures["ours"]["one_query"]) == {"ours", "faiss"}
    assert figures["data"]["machine"]["load_average"] >= 0
    capsys.readouterr()
    assert main([*command, "--sizes", "300", "400", "--rivals", "flat", "--resume"]) == 0
    assert capsys.readouterr().out.split()[0] == "400"
    second = json.loads(out.read_text())
    assert second["sizes"]["300"] == figures and set(second["sizes"]["400"]) == {
        "data",
        "ours",
        "filtered",
        "flat",
    }


def test_plain_faiss_is_scored_again_by_the_stored_vectors(program, vectors):
    import faiss

    rows = rows_of(vectors, 500).astype(np.float16)
    queries = vectors.texts(5, 500)
    index = faiss.IndexFlatIP(32)
    index.add(rows[::-1].astype(np.float32))  # its order is of no use: all rows are candidates
    scores, found = program._rescored(index, rows, 500)(queries, 10)
    exact = queries @ rows.astype(np.float32).T
    assert found.tolist() == np.argsort(-exact, axis=1)[:, :10].tolist()
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], rtol=1e-5)


def test_a_larger_collection_begins_with_a_smaller(vectors):
    small, large = rows_of(vectors, 700), rows_of(vectors, BLOCK_ROWS + 100)
    assert np.array_equal(small, large[:700]) and len(large) == BLOCK_ROWS + 100
    np.testing.assert_allclose(np.linalg.norm(large, axis=1), 1.0, rtol=1e-5)
    assert not np.array_equal(small, rows_of(SyntheticVectors(32, seed=1), 700))


def test_collections_are_not_trivial():
    vectors = SyntheticVectors(512)
    rows = rows_of(vectors, 4000)
    spectrum = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert 40 < spectrum.sum() ** 2 / (spectrum**2).sum() < 200  # effective dimensions
    texts = vectors.texts(100, 4000)
    best, ordinary = (texts @ rows.T).max(axis=1), texts @ rows.T
    # texts lie apart: their best is further off than a segment's neighbour in its own video
    neighbours = (rows[:-1:SEGMENTS_PER_VIDEO] * rows[1::SEGMENTS_PER_VIDEO]).sum(axis=1)
    assert best.max() < np.quantile(neighbours, 0.1)
    assert 0.3 < best.mean() < 0.8 and best.mean() > ordinary.mean() + 3 * ordinary.std()
    # and mostly find the video that they are about, but not only it
    owners = np.argmax(texts @ rows.T, axis=1) // SEGMENTS_PER_VIDEO
    assert len(set(owners.tolist())) > 50


def test_a_stored_collection_is_an_index(vectors, tmp_path):
    index = store(tmp_path / "index", vectors, 1234)
    assert index.verify() == []
    assert np.array_equal(index.vectors().gather(np.arange(1234)), rows_of(vectors, 1234).astype(np.float16))
    assert len(index.snapshot.videos) == 62
    assert index.snapshot.row_bounds[21].tolist() == [4.0, 12.0]
    again = store(tmp_path / "index", vectors, 1234)
    assert again.snapshot.generation == index.snapshot.generation


def test_committed_figures_keep_the_limits(program):
    figures = json.loads(asset("eval/results/index-tradeoff-cpu.json").read_text())
    limits, sizes = figures["limits"], figures["sizes"]
    assert limits == program.LIMITS and set(sizes) == {str(size) for size in program.SIZES}
    for size, entry in sizes.items():
        ours = entry["ours"]
        assert entry["data"]["machine"]["commit"] and entry["data"]["machine"]["threads"] == 2
        assert ours["recall_at_10"] >= limits["recall"]
        over, plain = ours["overhead_wall"], ours["one_query"]["faiss"]["p50_ms"]
        assert over["ms"] <= max(limits["overhead_ms"], limits["overhead"] * plain), size
    assert min(part["recall_at_10"] for part in sizes["1000000"]["filtered"].values()) >= limits["recall"]
    million = sizes["1000000"]["ours"]
    assert million["end_to_end"]["p50_ms"] <= limits["end_to_end_ms"]
    assert million["kind"] == "lists" and million["bytes_per_vector"] <= limits["bytes_per_vector"]
    assert million["stated_recall"]["texts"] >= limits["recall"]
