"""Alarms of `vlm index check`: each raised by an example made by hand, silent where chance explains it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from vlm.retrieval.quality.drift import find_drift


def run_of(ranks, scores=None, strengths=None, missing=(), **values) -> dict:
    """A run of the queries q0, q1, ..., each of a video of its own."""
    count = len(ranks)
    scores = [None if rank is None else 0.5 for rank in ranks] if scores is None else scores
    strengths = ["strong"] * count if strengths is None else strengths
    rows = [
        {"query": f"q{n}", "video": f"v{n}", "video_id": f"v{n}", "start_s": None, "end_s": None}
        for n in range(count + len(missing))
    ]
    outcomes = [
        {**row, "rank": rank, "score": score, "strength": strength}
        for row, rank, score, strength in zip(rows, ranks, scores, strengths, strict=False)
    ]
    usual = {
        "index": "i",
        "generation": 3,
        "model_fingerprint": "m",
        "rerank": 0,
        "bank_scores": [0.1, 0.2, 0.3],
    }
    lost = [{name: rows[n][name] for name in ("query", "video", "start_s", "end_s")} for n in missing]
    return {**usual, "outcomes": outcomes, "missing": lost, **values}


def alarms(before: dict, now: dict) -> list[str]:
    found = find_drift(before, now)
    json.dumps(found, allow_nan=False)
    return [one["alarm"] for one in found]


def test_nothing_changed_nothing_is_said() -> None:
    run = run_of([1, 2, None, 7])
    assert find_drift(run, run) == []


@pytest.mark.parametrize(("num_lost", "is_alarm"), [(5, False), (6, True)])
def test_recall_that_fell(num_lost, is_alarm) -> None:
    # six fair coins fall on one given side once in 64 times, five once in 32: more than 2.5 in a hundred
    before, now = run_of([3] * 40), run_of([12 if n < num_lost else 3 for n in range(40)])
    found = find_drift(before, now)
    assert [one["what"] for one in found] == ["recall@5 fell", "recall@10 fell"] * is_alarm
    assert alarms(now, before) == []
    if is_alarm:
        assert found[0]["value"] == pytest.approx(-6 / 40) and found[0]["high"] < 0


def test_losses_of_one_video_are_one_loss() -> None:
    before, now = run_of([1] * 40), run_of([None if n < 10 else 1 for n in range(40)])
    for run in (before, now):
        for outcome in run["outcomes"][:10]:
            outcome["video_id"] = "v0"
    assert alarms(before, now) == []


def test_scores_that_moved_with_the_same_model() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 30)
    before = run_of([1] * 30, [0.5] * 30)
    assert alarms(before, run_of([1] * 30, list(0.5 + noise - noise.mean()))) == []
    assert alarms(before, run_of([1] * 30, [0.4995] * 30)) == []
    assert alarms(before, run_of([1] * 30, list(0.4 + noise))) == ["scores"]
    assert alarms(before, run_of([1] * 30, list(0.6 + noise))) == ["scores"]
    assert alarms(before, run_of([1] * 30, list(0.4 + noise), model_fingerprint="other")) == []


def test_fewer_strong_hits() -> None:
    before = run_of([1] * 30)
    assert alarms(before, run_of([1] * 30, strengths=["weak"] * 6 + ["strong"] * 24)) == ["strong"]
    assert alarms(before, run_of([1] * 30, strengths=["weak"] * 5 + ["strong"] * 25)) == []
    assert alarms(run_of([1] * 30, strengths=["weak"] * 30), before) == []


def test_the_bank_of_an_unchanged_index() -> None:
    before = run_of([1])
    assert alarms(before, run_of([1], bank_scores=[0.1, 0.2, 0.31])) == ["bank"]
    assert alarms(before, run_of([1], bank_scores=[0.1, 0.2, 0.301])) == []
    assert alarms(before, run_of([1], bank_scores=[0.1, 0.2, 0.9], generation=4)) == []
    assert alarms(before, run_of([1], bank_scores=[0.1])) == []


def test_videos_that_left_are_no_misses() -> None:
    found = find_drift(run_of([1] * 9), run_of([1] * 7, missing=(7, 8)))
    assert [(one["alarm"], [item["video"] for item in one["items"]]) for one in found] == [
        ("left", ["v7", "v8"])
    ]
    # said once: the run before knew
    assert alarms(run_of([1] * 7, missing=(7, 8)), run_of([1] * 7, missing=(7, 8))) == []


def test_runs_of_before_the_alarms_are_compared_by_recall() -> None:
    old = run_of([1] * 20)
    for name in ("bank_scores", "generation", "rerank"):
        del old[name]
    for outcome in old["outcomes"]:
        del outcome["score"], outcome["strength"]
    assert alarms(old, run_of([1] * 20)) == []
    assert set(alarms(old, run_of([None] * 20))) == {"recall"}


@pytest.mark.parametrize("count", [8, 60])
def test_false_alarms_are_as_rare_as_stated(count) -> None:
    random, repeats, num_recall, num_scores = np.random.default_rng(1), 200, 0, 0
    for _ in range(repeats):
        ranks = np.where(random.random((2, count)) < 0.8, 1, None)
        scores = np.where(ranks == 1, random.normal(0.5, 0.1, (2, count)), None)
        found = alarms(*(run_of(list(r), list(s)) for r, s in zip(ranks, scores, strict=True)))
        num_recall += "recall" in found
        num_scores += "scores" in found
    # here the three recalls are one, and scores may move to either side; three binomial deviations above
    for seen, rate in ((num_recall, 0.025), (num_scores, 0.05)):
        assert seen / repeats <= rate + 3 * math.sqrt(rate * (1 - rate) / repeats)


def test_the_command_says_so_and_fails_if_asked(tmp_path, movies, call_vlm) -> None:
    import shutil

    from tests.retrieval.conftest import ColourEncoder
    from vlm.retrieval import VideoIndex

    films = tmp_path / "films"
    shutil.copytree(movies, films)
    model = ColourEncoder()
    index = VideoIndex.create(tmp_path / "index", model)
    index.add([films], model=model)
    (tmp_path / "known.csv").write_text("query,video\nred,films/rgb.mp4\nyellow,films/deep/yellow.mp4\n")
    words = (
        "index",
        "check",
        str(tmp_path / "index"),
        "--queries",
        str(tmp_path / "known.csv"),
        "--fail-on-drift",
    )
    for _ in range(2):
        code, output, _ = call_vlm(*words)
        assert code == 0 and "drift" not in output
    index.remove([films / "rgb.mp4"])
    code, output, _ = call_vlm(*words)
    assert code == 3 and "drift: 1 of the videos that queries name left the index: films/rgb.mp4" in output
    assert call_vlm(*words)[0] == 0
