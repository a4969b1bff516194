"""`vlm eval serving` runs, counts every answer, and its measures say what they claim."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from vlm.cli import main
from vlm.evaluation.tradeoff.stored import store
from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
from vlm.retrieval.searcher import Searcher
from vlm.serving.trial.clients import FAILED, Answer, Connection, summary
from vlm.serving.trial.phases import kept, recovered_s
from vlm.serving.trial.site import SHAPE, TrialModel, added_clip, text_of
from vlm.serving.trial.writer import main as write


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    command = ["eval", "serving", "--tiny", "--work", str(folder), "--out", str(folder / "out.json")]
    assert main(command) == 0
    return json.loads((folder / "out.json").read_text())


def test_every_request_is_counted_in_its_phase(figures):
    plain, rush, ingest = figures["ordinary"], figures["overload"], figures["ingest"]
    assert figures["clips"] == 600 and figures["machine"]["load_average"] >= 0
    assert (plain["clients"], rush["clients"], ingest["clients"]) == (2, 20, 2)
    assert plain["statuses"] == {"200": plain["requests"]} and plain["requests"] >= 2
    new = figures["new texts"]
    assert new["statuses"] == {"200": new["requests"]} and new["requests"] >= 2
    assert min(new["processor_ms"], new["client_processor_ms"]) > 0
    # the server has room for six at once: of twenty, some are refused, each told when to come back
    assert rush["refused"] == rush["errors"] == rush["statuses"]["503"] > 0
    assert rush["refused_without_retry_after"] == rush["other_errors"] == 0
    assert rush["statuses"]["200"] + rush["refused"] == rush["requests"]
    assert rush["after"]["requests"] >= 2
    assert ingest["statuses"] == {"200": ingest["requests"]}
    assert set(figures["kept"]) >= {"no errors", "recovers", "no failed reads", "fresh"}


def test_clips_that_are_added_are_found_while_others_search(figures):
    ingest = figures["ingest"]
    assert (ingest["added"], ingest["commits"], ingest["writer_is_whole"]) == (256, 2, True)
    assert ingest["never_found"] == 0 and 0 < ingest["fresh_p50_s"] <= ingest["fresh_max_s"]


def test_an_added_clip_is_the_best_hit_of_its_text_and_only_once_it_is_there(tmp_path):
    vectors = SyntheticVectors(32)
    index = store(tmp_path / "i", vectors, 40, *SHAPE)
    assert [video.num_segments for video in index.snapshot.videos] == [1] * 40
    searcher = Searcher(index, TrialModel(vectors, 40), backend="exact")
    best = searcher.search(text_of(43), top_k=1)[0]
    assert best.video_id != "video-0000043" and best.score < 0.9
    assert write([str(index.folder), "--clips", "5", "--every", "0"]) == 0
    searcher.refresh()
    best = searcher.search(text_of(43), top_k=1)[0]
    assert best.video_id == "video-0000043" and best.score == pytest.approx(1, abs=1e-3)
    stored = searcher.index.vectors().gather(np.array([42]))[0]
    np.testing.assert_array_equal(stored, added_clip(43, 32).astype(np.float16))
    assert index.verify() == []


def test_latencies_and_rates_are_of_answered_requests():
    answers = [Answer(0.1 * n, 0.010 * (n + 1), 200, False) for n in range(9)]
    found = summary([*answers, Answer(0.9, 0.1, 503, True), Answer(0.95, 0.05, FAILED, False)])
    assert found["statuses"] == {"0": 1, "200": 9, "503": 1}
    assert (found["requests"], found["errors"]) == (11, 2)
    assert found["requests_per_s"] == pytest.approx(9.0)
    assert found["p50_ms"] == pytest.approx(50.0) and 80 < found["p99_ms"] <= 90


def test_a_server_has_recovered_after_its_last_bad_half_second():
    good = [Answer(100 + 0.1 * n, 0.01, 200, False) for n in range(60)]
    assert recovered_s(good, 100.0) == 0
    assert recovered_s([*good, Answer(101.2, 0.01, 503, True)], 100.0) == 1.5
    assert recovered_s([*good, Answer(102.2, 3.0, 200, False)], 100.0) == 2.5
    assert recovered_s([*good, Answer(105.9, 0.01, FAILED, False)], 100.0) is None


@pytest.mark.parametrize(
    ("phase", "change", "promise"),
    [
        ("ordinary", {"errors": 1}, "no errors"),
        ("ordinary", {"requests_per_s": 199.0}, "requests/s"),
        ("ordinary", {"p99_ms": 151.0}, "p99"),
        ("new texts", {"errors": 1}, "no errors"),
        ("new texts", {"requests_per_s": 199.0}, "new texts, requests/s"),
        ("new texts", {"p99_ms": 151.0}, "new texts, p99"),
        ("overload", {"refused": 0}, "503 with Retry-After"),
        ("overload", {"other_errors": 1}, "503 with Retry-After"),
        ("overload", {"recovered_s": None}, "recovers"),
        ("ingest", {"errors": 1}, "no failed reads"),
        ("ingest", {"never_found": 1}, "fresh"),
        ("ingest", {"fresh_max_s": 5.1}, "fresh"),
    ],
)
def test_a_promise_that_is_not_kept_is_named(phase, change, promise):
    figures = {
        "ordinary": {"errors": 0, "requests_per_s": 200.0, "p99_ms": 150.0},
        "new texts": {"errors": 0, "requests_per_s": 200.0, "p99_ms": 150.0},
        "overload": {"refused": 9, "refused_without_retry_after": 0, "other_errors": 0, "recovered_s": 5.0},
        "ingest": {"errors": 0, "never_found": 0, "fresh_max_s": 5.0},
    }
    assert all(kept(figures).values())
    figures[phase] |= change
    assert [name for name, is_kept in kept(figures).items() if not is_kept] == [promise]


def test_a_server_that_is_gone_is_a_failed_request():
    answer, page = Connection("http://127.0.0.1:9").search({"text": "x"})
    assert (answer.status, answer.says_when, page) == (FAILED, False, {})


def test_wrong_sizes_are_refused(capsys):
    assert main(["eval", "serving", "--clips", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
