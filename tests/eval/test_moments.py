"""`vlm eval moments` from files to card: short videos of the digit world, and predictions in a file."""

from __future__ import annotations

import json

import pytest

from vlm.cli import main
from vlm.evaluation import read_card
from vlm.world.chapters.videos import LongVideo, sample_long, write_long

ANY_NUMBER = ("--set", "expected=null", "--set", "bootstrap.resamples=100")


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """Two videos of 24 s with four scenes each, which lie otherwise in one than in the other."""
    folder = tmp_path_factory.mktemp("long")
    pauses = ((0, 12, 12, 8), (16, 2, 6, 8))
    whole = [sample_long(3, index) for index in range(2)]
    parts = [LongVideo(seed=3, index=v.index, chapters=v.chapters[:4], pauses=pauses[v.index]) for v in whole]
    write_long(parts, folder)
    return folder


def command(folder, *more, name="world-long"):
    annotations = folder / "moments.jsonl"
    return ["eval", "moments", "--protocol", name, "--annotations", str(annotations), *ANY_NUMBER, *more]


def test_a_model_finds_moments_and_its_file_says_the_same(
    long_folder, model_folder, tmp_path, capsys, on_the_page
):
    out, saved = tmp_path / "card.json", tmp_path / "found.jsonl"
    seen = ("--videos", str(long_folder), "--model", str(model_folder), "--save-predictions", str(saved))
    assert main(command(long_folder, *seen, "--out", str(out))) == 0
    shown = capsys.readouterr().out
    assert "moments: 8 queries, 2 videos; model tiny" in shown and "random window" in shown
    card = read_card(out)
    assert card["leakage"] == {"status": "unchecked"} and "leakage: unchecked" in shown
    assert card["data"]["queries_truncated"] == 0
    page = on_the_page(out, "results", "baselines", "lengths")
    recall = card["results"]["moments"]["itc"]["recall@1@0.5"]["value"]
    assert f'data-x="0.5" data-y="{recall!r}"' in page and "random window" in page
    assert card["cost"]["stretches_encoded"] == 2 * 17  # (24 - 5) / 1.25, and one more at the end
    assert card["protocol"]["proposals"] == {"segment_s": [5.0], "stride": 0.25, "suppress_iou": 0.2}
    assert main(command(long_folder, "--predictions", str(saved), "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["results"]["moments"]["given"] == card["results"]["moments"]["itc"]
    assert again["model"]["name"] == "found.jsonl"
    assert main(["eval", "compare", str(out), str(out)]) == 0
    assert "moments, itc" in capsys.readouterr().out


def test_the_demonstration_model_beats_guessing(long_folder, tmp_path, capsys):
    assert main(command(long_folder, "--videos", str(long_folder), "--model", "demo", "--json")) == 0
    card = json.loads(capsys.readouterr().out)
    found, blind = card["results"]["moments"]["itc"], card["baselines"]["moments"]
    assert found["recall@1@0.5"]["value"] >= 0.5
    assert max(block["recall@1@0.5"]["value"] for block in blind.values()) < 0.3


def test_charades_in_its_own_layout(fixtures, tmp_path, capsys):
    """The text file says no lengths, so nothing can be guessed without the videos."""
    annotations = fixtures / "annotations" / "moments" / "charades_sta_test.txt"
    rows = [{"qid": "1", "moments": [[24.3, 30.4, 1]]}, {"qid": "2", "moments": []}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--annotations", str(annotations), "--predictions", str(tmp_path / "p.jsonl"), *ANY_NUMBER]
    assert main(["eval", "moments", "--protocol", "charades-sta", *asked]) == 0
    assert "no baselines" in capsys.readouterr().out
    assert main(["eval", "moments", "--protocol", "charades-sta", *asked, "--videos", str(tmp_path)]) == 4
    assert "the length of a video is not known" in capsys.readouterr().err


def test_refusals_have_their_exit_codes(long_folder, model_folder, tmp_path, capsys):
    model = ("--model", str(model_folder))
    assert main(command(long_folder, *model)) == 2
    assert "missing --videos (or --predictions)" in capsys.readouterr().err
    assert main(command(long_folder, *model, "--predictions", "p")) == 2
    assert main(command(long_folder, "--overlap", "o", "--predictions", "p")) == 2
    assert main(command(long_folder, *model, "--videos", str(tmp_path), "--batch-size", "0")) == 2
    assert main(command(long_folder, *model, "--videos", str(tmp_path / "none"))) == 4
    assert "no such folder of videos" in capsys.readouterr().err
    assert main(command(long_folder, *model, "--videos", str(tmp_path))) == 4
    assert "2 of 2 videos cannot be read (long-3-000000: missing" in capsys.readouterr().err
    assert main(command(long_folder, *model, "--videos", str(tmp_path), "--allow-missing")) == 4
    assert "no query can be asked" in capsys.readouterr().err
    assert main(command(long_folder, "--model", "f.npz", "--videos", str(long_folder))) == 4
    assert "stored features are of whole videos" in capsys.readouterr().err
    assert main(command(long_folder, *model, "--videos", str(long_folder), name="msrvtt-1ka")) == 4
    assert "measures retrieval" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"qid": "x", "moments": []}\n')
    assert main(command(long_folder, "--predictions", str(tmp_path / "p.jsonl"))) == 4
    assert "8 of 8 queries have no entry" in capsys.readouterr().err
    expected = ["eval", "moments", "--protocol", "world-long", "--annotations"]
    asked = [*expected, str(long_folder / "moments.jsonl"), "--predictions", str(tmp_path / "p.jsonl")]
    assert main(asked) == 4
    assert "moments: expected 261, found 8" in capsys.readouterr().err
