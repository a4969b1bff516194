"""What a card says of the gallery in the training set: unchecked, found, or only partly looked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vlm.errors import InvalidInput
from vlm.evaluation import compare_cards, render_card, render_comparison
from vlm.evaluation.card.leakage import leakage_section, read_overlap
from vlm.evaluation.runner import RunOptions, evaluate_model

QUICK = RunOptions(test_time_controls=False)


@pytest.fixture
def named(data):
    """The gallery with files as a folder would hold them."""
    paths = tuple(Path(f"videos/{number:02d}.mp4") for number in range(len(data.paths)))
    return dataclasses.replace(data, paths=paths)


@pytest.fixture
def overlap(named, tmp_path):
    def write(**changes):
        report = {
            "format": "vlm-overlap/1",
            "first_sha256": "a" * 64,
            "second_sha256": "b" * 64,
            "num_first": 1000,
            "num_second": 21,
            "num_second_in_first": 4,
            "by": {"id": 2, "sha256": 0, "picture": 3},
            "captions": {
                "num_first": 900,
                "num_second": 20,
                "shared": [named.queries[4], "not among the queries"],
            },
            "unreadable": {"first": {}, "second": {}},
            "matches": [
                {"by": "id", "first": "x.mp4", "second": "clips/03.mp4", "value": 1.0},
                {"by": "picture", "first": "x.mp4", "second": "clips/03.mp4", "value": 0.1},
                {"by": "picture", "first": "y.mp4", "second": "07", "value": 0.2},
                {"by": "picture", "first": "y.mp4", "second": "09.mp4", "value": 0.2},
                {"by": "id", "first": "z.mp4", "second": "elsewhere.mp4", "value": 1.0},
            ],
            "second_videos": [f"clips/{number:02d}.mp4" for number in range(20)] + ["elsewhere.mp4"],
        }
        path = tmp_path / "overlap.json"
        path.write_text(json.dumps(report | changes))
        return read_overlap(path)

    return write


def test_only_videos_of_the_gallery_count(named, overlap):
    section = leakage_section(overlap(), named.paths, named.queries)
    assert section["status"] == "checked"
    assert section["by"] == {"id": 1, "sha256": 0, "picture": 3}
    assert (section["videos_shared"], section["videos_checked"], section["videos"]) == (3, 20, 20)
    assert section["captions_shared"] == sum(query == named.queries[4] for query in named.queries)
    assert section["training_set"] == {"sha256": "a" * 64, "videos": 1000}
    assert len(section["overlap_sha256"]) == 64


def test_videos_that_nobody_looked_at(named, overlap):
    listed = [f"{number:02d}.mp4" for number in range(15)]
    found = overlap(
        second_videos=listed, unreadable={"first": {}, "second": {"00.mp4": "empty"}}, captions=None
    )
    section = leakage_section(found, named.paths, named.queries)
    assert (section["status"], section["videos_checked"]) == ("partly checked", 14)
    assert "captions_shared" not in section
    with pytest.raises(InvalidInput, match="none of the gallery's videos"):
        leakage_section(overlap(second_videos=["other.mp4"]), named.paths)


def test_in_the_card_and_in_words(toy, named, data, protocol, load, overlap):
    def load_named(path, preprocessing):
        return load(Path(str(int(path.stem))), preprocessing)

    unchecked = evaluate_model(toy("order"), data, protocol, load, options=QUICK)
    assert unchecked["leakage"] == {"status": "unchecked"}
    assert "leakage: unchecked" in render_card(unchecked)
    leaked = evaluate_model(toy("order"), named, protocol, load_named, options=QUICK, overlap=overlap())
    line = "leakage: checked: 3 of 20 videos are in the training set (by id 1, sha256 0, picture 3)"
    assert line in render_card(leaked)
    clean = evaluate_model(
        toy("order"), named, protocol, load_named, options=QUICK,
        overlap=overlap(matches=[], captions={"num_first": 1, "num_second": 1, "shared": []}),
    )  # fmt: skip
    assert clean["leakage"]["status"] == "checked"
    assert "leakage" not in render_card(clean)
    comparison = compare_cards(unchecked, leaked)
    assert comparison["leakage"] == [unchecked["leakage"], leaked["leakage"]]
    text = render_comparison(comparison)
    assert "leakage: unchecked" in text
    assert line in text


@pytest.mark.parametrize("content", ["", "[]", '{"format": "vlm-card/1"}', "{"])
def test_files_that_are_no_overlap(tmp_path, content):
    path = tmp_path / "overlap.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=r"overlap\.json"):
        read_overlap(path)
    with pytest.raises(InvalidInput, match=r"none\.json"):
        read_overlap(tmp_path / "none.json")
