"""`vlm eval store_speed` publishes made-up vectors and finds in the store what the index finds."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lancedb")

from vlm.cli import main


def test_every_way_finds_the_same(tmp_path, monkeypatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr("vlm.retrieval.backends.structured.kind_for", lambda num_rows: "lists")
    out = tmp_path / "speed.json"
    words = ["--sizes", "600", "--dim", "32", "--queries", "3", "--to", str(tmp_path / "shop")]
    assert main(["eval", "store_speed", *words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["sizes"]["600"]
    names = {"index", "store, by structure", "store, every vector"}
    assert found["same_hits_as_index"] == dict.fromkeys(names, 1.0)
    assert set(found["searches"]) == names
    assert all(0 < one["p50_ms"] <= one["p99_ms"] for one in found["searches"].values())
    assert (tmp_path / "shop" / "32-600.store").is_dir()
