"""Grades of hits: a formula for the thresholds, the toy model's truth, and the digit world with its model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.strength import Calibration, TextBank
from vlm.retrieval.strength.unrelated import texts_for


def calibrated(scores, reranked=()) -> Calibration:
    return Calibration(bank="b", num_rows=10, scores=tuple(scores), reranked=tuple(reranked))


def test_grades_are_quantiles_of_the_bank() -> None:
    bank = np.arange(101) / 100
    grades = calibrated(bank).grade(np.array([0.9 + 1e-9, 0.9 - 1e-9, 0.5 + 1e-9, 0.5 - 1e-9, -3.0]))
    assert grades == ["strong", "weak", "weak", "unrelated", "unrelated"]


def test_a_bank_whose_texts_all_score_alike() -> None:
    bank = calibrated([0.3] * 9, [1.3] * 9)
    assert bank.grade(np.array([0.31, 0.3])) == ["strong", "unrelated"]
    assert bank.grade_reranked(np.array([1.31, 1.3])) == ["strong", "unrelated"]


@pytest.mark.parametrize("domain", ["open", "digit-world"])
def test_the_banks_texts_are_many_distinct_and_always_the_same(domain) -> None:
    texts = texts_for(domain)
    assert len(texts) >= 100 and len(set(texts)) == len(texts)
    assert texts == texts_for(domain)


@pytest.fixture
def searcher(tmp_path, movies, make_encoder) -> Searcher:
    model = make_encoder()
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([movies], model=model)
    # the yellow of the yellow video scores between the two that red finds
    return Searcher(index, model, bank=TextBank(model, ("grey", "yellow", "grey", "yellow", "grey", "grey")))


def test_hits_are_graded_and_the_weak_left_out(searcher) -> None:
    hits = searcher.search("red")
    assert [hit.strength for hit in hits] == ["strong", "weak", "unrelated"]
    assert searcher.search("red", min_strength="strong") == hits[:1]
    assert searcher.search("red", min_strength="weak") == hits[:2]
    # a text without a direction fits nothing better than another
    assert searcher.search("grey", min_strength="weak") == []
    assert {hit.strength for hit in searcher.search("grey")} == {"unrelated"}


def test_the_head_has_its_own_measure(searcher) -> None:
    hits = searcher.search("red", rerank=3)
    assert hits[0].score_kind == "itm@3" and hits[0].strength == "strong"
    # who was not asked about is at best weak
    assert all(hit.strength != "strong" for hit in hits if hit.score_kind == "itc")
    (path,) = (searcher.index.folder / "ann").glob("strength.json")
    kept = json.loads(path.read_text().partition("\n")[2])
    assert len(kept["scores"]) == len(kept["reranked"]) == 6


def test_the_bank_is_scored_as_a_search_reranks(searcher) -> None:
    searcher.model.logit_scale = 10.0
    again = Searcher(VideoIndex.open(searcher.index.folder), searcher.model, bank=searcher._bank)
    again.search("red", rerank=3)
    kept = json.loads((again.index.folder / "ann" / "strength.json").read_text().partition("\n")[2])
    best = {text: again.search(text, rerank=3)[0] for text in ("grey", "yellow")}
    assert {hit.score_kind for hit in best.values()} == {"itm+itc@3"}
    expected = [best[text].score for text in ("grey", "yellow", "grey", "yellow", "grey", "grey")]
    assert kept["reranked"] == pytest.approx(expected, abs=1e-4)


def test_only_texts_are_graded(searcher) -> None:
    pixels = np.full((32, 32, 3), (220, 20, 20), np.uint8)
    assert [hit.strength for hit in searcher.search(pixels)] == [None] * 3
    with pytest.raises(CapabilityError, match="only hits of a text"):
        searcher.search(pixels, min_strength="weak")
    with pytest.raises(InvalidInput, match="strong or weak"):
        searcher.search("red", min_strength="good")


def test_the_calibration_is_kept_and_made_again_when_the_index_has_grown(
    searcher, tmp_path, clip, colours, make_encoder
) -> None:
    searcher.search("red")
    path = searcher.index.folder / "ann" / "strength.json"
    before = path.stat().st_mtime_ns
    bank = searcher._bank
    again = Searcher(VideoIndex.open(searcher.index.folder), make_encoder(), bank=bank)
    assert again.search("red") == searcher.search("red")
    assert path.stat().st_mtime_ns == before
    clip(tmp_path / "more" / "new.mp4", [(colours.yellow, 30)])
    searcher.index.add([tmp_path / "more"], model=make_encoder())
    searcher.refresh()
    searcher.search("red")
    assert path.stat().st_mtime_ns > before


def test_a_damaged_or_foreign_calibration_is_not_used(searcher, make_encoder) -> None:
    hits = searcher.search("red")
    path = searcher.index.folder / "ann" / "strength.json"
    whole = path.read_bytes()
    for junk in (b"", whole[:-9], whole.replace(b"num_rows", b"num_cows"), b"x" * 80):
        path.write_bytes(junk)
        again = Searcher(VideoIndex.open(searcher.index.folder), make_encoder(), bank=searcher._bank)
        assert again.search("red") == hits
        assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_searched_all_the_same(searcher, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("vlm.retrieval.strength.calibration.write_sealed", refuse)
    assert searcher.search("red")[0].strength == "strong"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes of the digit world without forty of its sixty things, indexed; and a third of the others."""
    from vlm.evaluation.tradeoff.absent import divide, index_scenes
    from vlm.models import load_model

    divided = divide("test", 1, 400, num_absent=40, choice=2)
    searcher = index_scenes(tmp_path_factory.mktemp("world"), load_model("demo"), divided.present)
    return searcher, divided.present, divided.absent[::3]


def test_things_that_are_absent_are_rarely_strong_and_present_ones_are(world) -> None:
    from vlm.world import caption

    searcher, present, absent = world
    assert len(present) >= 40 and len(absent) >= 60

    def share(scenes) -> float:
        found = [searcher.search(caption(s), rerank=16, top_k=3, min_strength="strong") for s in scenes]
        return float(np.mean([bool(hits) for hits in found]))

    assert share(present) >= 0.9
    assert share(absent) <= 0.1
    assert Path(os.fspath(searcher.index.folder), "ann", "strength.json").exists()
