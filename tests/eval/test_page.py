"""`vlm eval retrieval --out`: the page beside the card, its pictures, the frames curve and the overlap."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from vlm.cli import main
from vlm.evaluation import read_card


@pytest.fixture
def command(world_folder, model_folder):
    named = [
        "--annotations",
        world_folder / "manifest.jsonl",
        "--videos",
        world_folder,
        "--model",
        model_folder,
    ]
    quick = ["--set", "bootstrap.resamples=100", "--set", "rerank_k=0", "--no-test-time-controls"]
    return ["eval", "retrieval", "--protocol", "world", *map(str, [*named, *quick])]


def test_card_and_page(command, world_folder, tmp_path):
    out = tmp_path / "new" / "card.json"
    assert main([*command, "--out", str(out), "--frames-curve", "8", "1", "1"]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["card.html", "card.json"]
    card, page = read_card(out), out.with_suffix(".html").read_text(encoding="utf-8")
    assert [point["frames"] for point in card["frames_curve"]["points"]] == [1, 8]
    assert card["frames_curve"]["points"][1]["results"] == card["results"]
    names = {entry[which]["name"] for half in ("best", "worst") for entry in card["examples"][half]
             for which in ("right", "first")}  # fmt: skip
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="frames of ([^"]+)">', page)
    assert {name for _, name in pictures} == names
    size = Image.open(io.BytesIO(base64.b64decode(pictures[0][0]))).size
    assert size == (5 * 80 + 4 * 2, 80)  # five square frames with gaps
    assert len(page) < 1_000_000


def test_examples_are_those_of_the_scores(command, world_folder, tmp_path):
    """The card's worst query has the rank that the card's own outcome of that query says."""
    out = tmp_path / "card.json"
    assert main([*command, "--out", str(out)]) == 0
    card = read_card(out)
    outcome = card["per_query"]["query_to_item"]["itc"]
    ranks = np.array(outcome["above"]) + (np.array(outcome["tied"]) + 1) / (
        np.array(outcome["tied_positives"]) + 1
    )
    worst, best = card["examples"]["worst"], card["examples"]["best"]
    assert worst[0]["rank"] == ranks.max() == ranks[worst[0]["query"]]
    assert best[0]["rank"] == ranks.min() == ranks[best[0]["query"]]
    rows = [json.loads(line) for line in (world_folder / "manifest.jsonl").read_text().splitlines()]
    for entry in (*worst, *best):
        assert entry["caption"] == rows[entry["query"]]["caption"]
        assert entry["first"]["name"] == rows[entry["first"]["item"]]["id"]
        assert entry["first"]["score"] >= entry["right"]["score"]


def test_an_overlap_from_the_command_to_the_card(command, world_folder, tmp_path, capsys):
    """Two of the gallery's clips are among the training videos under other names."""
    rows = [json.loads(line) for line in (world_folder / "manifest.jsonl").read_text().splitlines()]
    train = tmp_path / "train"
    train.mkdir()
    for place in (3, 8):
        (train / f"other-{place}.mp4").write_bytes((world_folder / rows[place]["file"]).read_bytes())
    found = tmp_path / "overlap.json"
    test = [str(world_folder / "manifest.jsonl"), "--second-videos", str(world_folder)]
    assert main(["data", "overlap", str(train), *test, "--no-pictures", "--out", str(found)]) == 5
    out = tmp_path / "card.json"
    capsys.readouterr()
    assert main([*command, "--overlap", str(found), "--out", str(out)]) == 0
    line = "leakage: checked: 2 of 20 videos are in the training set (by id 0, sha256 2)"
    assert line in capsys.readouterr().out
    section = read_card(out)["leakage"]
    assert (section["status"], section["by"]) == ("checked", {"id": 0, "sha256": 2})
    assert "captions_shared" not in section  # a folder of videos has no captions
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert line in page
    assert section["overlap_sha256"] in page
    assert main([*command, "--out", str(out)]) == 0
    assert read_card(out)["leakage"] == {"status": "unchecked"}
    assert "leakage: unchecked" in out.with_suffix(".html").read_text(encoding="utf-8")


def test_wrong_flags(command, tmp_path, capsys):
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "index.html").write_text("<!doctype html><title>mine</title>")
    scores = ["eval", "retrieval", "--scores", "s.npy", "--positives", "p.json"]
    cases = [
        ([*command, "--frames-curve", "9"], 4, "from 1 to 8"),
        ([*command, "--frames-curve"], 2, "expected at least one argument"),
        ([*command, "--overlap", str(tmp_path / "none.json")], 4, "none.json"),
        ([*command, "--overlap", str(tmp_path / "no.json")], 4, "vlm-overlap/1"),
        ([*command, "--out", str(tmp_path / "card.html")], 2, "its page goes beside it"),
        ([*command, "--out", str(tmp_path / "index.json")], 2, "index.html: the card's page would replace"),
        ([*scores, "--frames-curve", "1"], 2, "go with --model"),
        ([*scores, "--overlap", "o.json"], 2, "go with --model"),
    ]
    for arguments, code, message in cases:
        assert main(arguments) == code, arguments
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "no.json"]
    assert "mine" in (tmp_path / "index.html").read_text()
