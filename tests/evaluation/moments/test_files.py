"""Annotations and predictions as files bring them, hostile ones too."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from vlm.errors import InvalidInput
from vlm.evaluation import load_protocol
from vlm.evaluation.moments.data import read_moment_set
from vlm.evaluation.moments.predictions import read_predictions, write_predictions

PROTOCOL = replace(load_protocol("qvhighlights"), expected=None)
ROWS = [
    {
        "qid": 7,
        "query": "a dog",
        "vid": "b",
        "duration": 10,
        "relevant_windows": [[0, 4]],
        "relevant_clip_ids": [0, 1],
        "saliency_scores": [[4, 1, 1], [2, 2, 3]],
    },
    {"qid": 9, "query": "a cat", "vid": "a", "duration": 20.5, "relevant_windows": [[2, 4], [8, 20]]},
]
GOOD = [{"qid": 9, "pred_relevant_windows": []}, {"qid": 7, "pred_relevant_windows": [[0, 4, 0.5]]}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    return read_moment_set(PROTOCOL, write_lines(tmp_path / "truth.jsonl", ROWS), None)


def predictions(tmp_path, data, rows):
    return read_predictions(write_lines(tmp_path / "found.jsonl", rows), data)


def test_annotations(data):
    assert data.query_ids == ("7", "9") and data.video_ids == ("a", "b")
    assert data.query_video.tolist() == [1, 0] and data.durations_s == (20.5, 10)
    assert data.truths[1].tolist() == [[2, 4], [8, 20]] and data.num_unreachable == 0
    assert data.ratings[0].tolist() == [[4, 1, 1], [2, 2, 3], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert data.ratings[1] is None
    fewer = data.without_videos({0})
    assert (fewer.query_ids, fewer.video_ids, fewer.query_video.tolist()) == (("7",), ("b",), [0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qid": 7}, "query '7' stands there twice"),
        ({"relevant_windows": []}, "query '9': expected at least one window"),
        ({"relevant_windows": [[0, float("nan")]]}, "query '9': expected at least one window of finite"),
        ({"relevant_clip_ids": [10], "saliency_scores": [[1]]}, "query '9'.*the 10 clips of 2 s.*clip 10"),
        ({"relevant_clip_ids": [0, 1], "saliency_scores": [[1], [1, 2]]}, "as many people for each clip"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, changed, message):
    path = write_lines(tmp_path / "truth.jsonl", [ROWS[0], {**ROWS[1], **changed}])
    with pytest.raises(InvalidInput, match=message):
        read_moment_set(PROTOCOL, path, None)


def test_predictions_are_sorted_and_joined_by_query(tmp_path, data):
    rows = [
        {"query_id": "9", "moments": [[1, 2, 0.1], [3, 4, 0.7], [5, 5, 0.7]], "saliency": [1, 2]},
        {"qid": 7, "pred_relevant_windows": []},
    ]
    found = predictions(tmp_path, data, rows)
    assert found.windows[0].shape == (0, 3) and found.saliency[0] is None
    assert found.windows[1].tolist() == [[3, 4, 0.7], [5, 5, 0.7], [1, 2, 0.1]] and found.num_tied == 1
    assert found.saliency[1].tolist() == [1, 2]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert read_predictions(tmp_path / "list.json", data).windows[1].tolist() == found.windows[1].tolist()


def test_what_is_written_is_read_again(tmp_path, data):
    found = predictions(tmp_path, data, [{**row, "saliency": [0.25, 1]} for row in GOOD])
    write_predictions(found, data, tmp_path / "out" / "again.jsonl")
    again = read_predictions(tmp_path / "out" / "again.jsonl", data)
    for left, right in zip(found.windows + found.saliency, again.windows + again.saliency, strict=True):
        assert np.array_equal(left, right)
    assert json.loads((tmp_path / "out" / "again.jsonl").read_text().splitlines()[0])["vid"] == "b"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:1], "1 of 2 queries have no entry, such as '7'"),
        ([*GOOD, {"qid": 8, "moments": []}], "1 entries are of unknown queries, such as '8'"),
        ([*GOOD, GOOD[0]], "query '9' stands there twice"),
        ([], "2 of 2 queries have no entry"),
        ([{"moments": []}], "entry 1: expected an object a line with qid"),
        ([[1]], "entry 1: expected an object a line with qid"),
        ([{"qid": True, "moments": []}], "entry 1: expected"),
        ([GOOD[1], {"qid": 9}], "query '9': expected pred_relevant_windows"),
        ([GOOD[1], {"qid": 9, "moments": [[1, 2]]}], r"query '9': expected .*got \[\[1, 2\]\]"),
        ([GOOD[1], {"qid": 9, "moments": [[1, 2, True]]}], "query '9': expected"),
        ([GOOD[1], {"qid": 9, "moments": [[1, 2, "3"]]}], "query '9': expected"),
        ([GOOD[1], {"qid": 9, "moments": [[1, float("nan"), 3]]}], "query '9': .* finite numbers"),
        ([GOOD[1], {"qid": 9, "moments": [[1, 2, float("inf")]]}], "query '9': .* finite numbers"),
        ([GOOD[1], {"qid": 9, "moments": [[1, 2, 10**400]]}], "query '9': .* finite numbers"),
        ([GOOD[1], {"qid": 9, "moments": [[0, 1, 1], [3, 2, 1]]}], r"'9': a window ends.*: \[3, 2, 1\]"),
        ([GOOD[1], {"qid": 9, "moments": [], "saliency": [float("nan")]}], "'9': expected pred_saliency"),
    ],
)
def test_predictions_that_cannot_be_used(tmp_path, data, rows, message):
    with pytest.raises(InvalidInput, match=message):
        predictions(tmp_path, data, rows)


def test_predictions_that_are_no_lines_of_json(tmp_path, data):
    (tmp_path / "found.jsonl").write_text("{'qid': 7}\n")
    with pytest.raises(InvalidInput, match="expected JSON, an object a line"):
        read_predictions(tmp_path / "found.jsonl", data)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_predictions(tmp_path / "none.jsonl", data)


def test_the_published_validation_part(shared):
    """1,550 queries; three people rated clips for each, and every true window lies in its video."""
    data = read_moment_set(
        load_protocol("qvhighlights"), shared / "annotations/qvhighlights/highlight_val_release.jsonl", None
    )
    assert (len(data.queries), len(data.video_ids), data.num_unreachable) == (1550, 1519, 0)
    assert {table.shape[1] for table in data.ratings} == {3}
    assert max(float(table.max()) for table in data.ratings) == 4
    ends = [
        truth.max() - data.durations_s[video]
        for truth, video in zip(data.truths, data.query_video, strict=True)
    ]
    assert max(ends) <= 2  # a last clip that the video does not fill


def test_our_own_predictions_come_back_whatever_the_queries_hold(tmp_path):
    rows = [{**ROWS[0], "query": "a dog\u2028runs\x85off"}, ROWS[1]]
    data = read_moment_set(PROTOCOL, write_lines(tmp_path / "truth.jsonl", rows), None)
    found = predictions(tmp_path, data, GOOD)
    write_predictions(found, data, tmp_path / "again.jsonl")
    again = read_predictions(tmp_path / "again.jsonl", data)
    assert [windows.tolist() for windows in again.windows] == [windows.tolist() for windows in found.windows]
