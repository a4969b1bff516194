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


def calibrated(scores, matched=(), logits=()) -> Calibration:
    return Calibration(
        bank="b", num_rows=10, scores=tuple(scores), matched_scores=tuple(matched), logits=tuple(logits)
    )


def test_grades_are_quantiles_of_the_bank() -> None:
    bank = np.arange(101) / 100
    grades = calibrated(bank).grade(np.array([0.9 + 1e-9, 0.9 - 1e-9, 0.5 + 1e-9, 0.5 - 1e-9, -3.0]))
    assert grades == ["strong", "weak", "weak", "unrelated", "unrelated"]


def test_score_and_logit_count_alike_in_units_of_their_own_spread() -> None:
    scores, logits = np.linspace(0, 1, 101), np.linspace(-100, 100, 101)
    bank = calibrated(scores, scores, logits)
    # both in step: the sum's quantiles are those of either
    assert bank.grade_matched(np.array([0.91, 0.87, 0.4]), np.array([82.0, 74.0, -20.0])) == [
        "strong", "weak", "unrelated",
    ]  # fmt: skip
    # one makes good for the other
    assert bank.grade_matched(np.array([1.0, 0.7]), np.array([70.0, 40.0])) == ["strong", "weak"]


def test_a_bank_whose_texts_all_score_alike_grades_without_dividing_by_nothing() -> None:
    bank = calibrated([0.3] * 9, [0.3] * 9, [1.0] * 9)
    assert bank.grade(np.array([0.31, 0.3])) == ["strong", "unrelated"]
    assert bank.grade_matched(np.array([0.31, 0.3]), np.array([1.0, 1.0])) == ["strong", "unrelated"]


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
    assert len(kept["scores"]) == len(kept["logits"]) == 6


def test_the_bank_prefers_as_a_search_does(searcher) -> None:
    """Its measure is of what head and embedding together put first, whatever the head alone prefers."""

    def kept(scale):
        searcher.model.logit_scale = scale
        again = Searcher(VideoIndex.open(searcher.index.folder), searcher.model, bank=searcher._bank)
        again.search("red", rerank=3)
        path = searcher.index.folder / "ann" / "strength.json"
        values = json.loads(path.read_text().partition("\n")[2])
        path.unlink()
        return values

    by_head, by_both = kept(None), kept(1e6)
    assert by_both["matched_scores"] == pytest.approx(by_both["scores"])
    assert max(by_head["logits"]) >= max(by_both["logits"])


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
    """Scenes of the digit world without forty of its sixty things, indexed; and the others."""
    from vlm.models import load_model
    from vlm.world import FPS, NUM_FRAMES, gallery, render, truth_matrix
    from vlm.world.clips import encode

    scenes = list(gallery("test", 1, 400))
    things = [frozenset((t.colour, t.digit) for t in scene.things) for scene in scenes]
    every = sorted(set().union(*things))
    kept = {every[i] for i in np.random.default_rng(2).permutation(len(every))[40:]}
    present = [scene for scene, shown in zip(scenes, things, strict=True) if shown <= kept]
    others = [scene for scene, shown in zip(scenes, things, strict=True) if not shown <= kept]
    absent = [scene for scene in others[::3] if not truth_matrix([scene], present).any()]
    folder = tmp_path_factory.mktemp("world")
    (folder / "v").mkdir()
    for first in range(0, len(present), 4):
        frames = np.concatenate([render(scene) for scene in present[first : first + 4]])
        encode(frames, folder / "v" / f"{first:03}.mp4")
    clip_s = NUM_FRAMES / FPS
    model = load_model("demo")
    index = VideoIndex.create(folder / "i", model, segment_s=clip_s, stride_s=clip_s)
    index.add([folder / "v"], model=model)
    return Searcher(index, model), present, absent


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
