"""`vlm eval qa` on the world's questions, and models whose answers are known beforehand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vlm.cli import main
from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation import compare_cards, load_protocol, read_card, render_card
from vlm.evaluation.launch import load_clip
from vlm.evaluation.questions import evaluate_choices
from vlm.evaluation.world_manifest import read_world_questions
from vlm.types import Preprocessing


class Chooser:
    """Scores candidates by a rule on their places."""

    name, kind, domain, fingerprint = "chooser", "video-text", "digit-world", "0"
    capabilities = frozenset({"choose"})
    preprocessing = Preprocessing(num_frames=8, image_size=64)
    device = torch.device("cpu")

    def __init__(self, rule):
        self.rule = rule

    def score_candidates(self, video, questions, candidates):
        assert video.shape == (1, 8, 3, 64, 64)
        assert len(questions) == len(candidates)
        return [torch.tensor([self.rule(option, options) for option in options]) for options in candidates]


@pytest.fixture(scope="module")
def data(world_folder):
    return read_world_questions(world_folder / "manifest.jsonl", world_folder)


@pytest.fixture
def ask(data):
    return lambda rule, **named: evaluate_choices(
        Chooser(rule), data, load_protocol("world"), load_clip, **named
    )


def test_questions_are_those_of_the_manifest(data, world_folder):
    assert len(data.paths) == 20
    assert len(data.questions) > 40
    for question in data.questions:
        assert 0 <= question.answer < len(question.candidates)
        assert len(set(question.candidates)) == len(question.candidates) >= 2


def test_knowing_guessing_and_collapsing(ask, data):
    right = {(q.candidates, q.candidates[q.answer]) for q in data.questions}
    # the same candidates may be asked with another answer, so the pair of both decides
    knows = ask(lambda option, options: float((tuple(options), option) in right))["results"][
        "multiple_choice"
    ]
    flat = ask(lambda *_: 0.5)["results"]["multiple_choice"]
    assert knows["all"]["accuracy"]["value"] > 0.9
    assert knows["all"]["num_questions"] == len(data.questions)
    assert sum(block["num_questions"] for kind, block in knows.items() if kind != "all") == len(
        data.questions
    )
    for block in flat.values():
        assert block["accuracy"]["value"] == pytest.approx(block["chance"]["value"])


def test_parts_of_the_choice_stand_alone(ask, data, monkeypatch):
    """The published mix of matching and contrastive scores, and what each of them chooses by itself."""
    right = {(q.candidates, q.candidates[q.answer]) for q in data.questions}

    def candidate_parts(self, video, questions, candidates):
        knows = [torch.tensor([float((tuple(row), option) in right) for option in row]) for row in candidates]
        return [(row, torch.full_like(row, 1 / len(row))) for row in knows]

    monkeypatch.setattr(Chooser, "candidate_parts", candidate_parts, raising=False)
    card = ask(lambda *_: pytest.fail("the parts are mixed, not scored again"))
    whole = card["results"]["multiple_choice"]["all"]
    parts = card["results"]["multiple_choice_parts"]
    assert list(parts) == ["matching", "contrastive"]
    assert parts["matching"]["accuracy"] == whole["accuracy"]
    assert whole["accuracy"]["value"] > 0.9
    assert parts["contrastive"]["accuracy"]["value"] == pytest.approx(whole["chance"]["value"])
    assert "all, matching alone" in render_card(card)


def test_how_sure_a_choice_is(ask, data):
    card = ask(lambda option, options: 0.9 if option == options[0] else 0.1)
    right = card["results"]["multiple_choice"]["all"]["accuracy"]["value"]
    assert card["calibration"]["ece"]["value"] == pytest.approx(0.9 - right)
    assert card["abstention"]["aurc"]["value"] == pytest.approx(1 - right)  # always equally sure
    assert len(card["per_query"]["multiple_choice"]["all"]["right"]) == len(data.questions)
    entry = compare_cards(card, card)["differences"]["multiple_choice"]["all"]["accuracy"]
    assert (entry["value"], entry["low"], entry["high"]) == (0, 0, 0)
    logits = ask(lambda option, options: 5.0 if option == options[0] else -5.0)
    assert "calibration" not in logits and "abstention" in logits


def test_what_cannot_be_measured_is_refused(ask, data, monkeypatch):
    with pytest.raises(InvalidInput, match="not finite"):
        ask(lambda *_: math.nan)
    monkeypatch.setattr(Chooser, "capabilities", frozenset({"search"}))
    with pytest.raises(CapabilityError, match="cannot choose among answers; it can: search"):
        ask(lambda *_: 0.0)


def test_program(world_folder, model_folder, tmp_path, capsys, on_the_page):
    out = tmp_path / "card.json"
    manifest = world_folder / "manifest.jsonl"
    named = ["--protocol", "world", "--annotations", str(manifest), "--model", str(model_folder)]
    assert main(["eval", "qa", *named, "--videos", str(world_folder), "--out", str(out)]) == 0
    block = read_card(out)["results"]["multiple_choice"]["all"]
    assert block["accuracy"]["low"] <= block["chance"]["value"] <= block["accuracy"]["high"]
    page = on_the_page(out, "results")
    card = read_card(out)
    for section, x, y in (("calibration", "confidence", "accuracy"), ("abstention", "coverage", "risk")):
        for row in card[section]["bins" if section == "calibration" else "curve"]:
            assert f'data-x="{row[x]!r}" data-y="{row[y]!r}"' in page
    assert "leakage: unchecked" in page
    text = capsys.readouterr().out
    assert "guessing" in text and "all, contrastive alone" in text and "calibration error" in text
    assert main(["eval", "qa", *named, "--videos", str(tmp_path)]) == 4
    assert "20 of 20 clips cannot be read" in capsys.readouterr().err


def test_clips_that_are_missing_and_known_from_training(world_folder, model_folder, tmp_path, capsys):
    """Missing clips stop before anything is measured, unless so many are allowed; overlap is said."""
    import shutil

    folder = tmp_path / "clips"
    shutil.copytree(world_folder, folder)
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    asked = [line for line in lines if line["questions"]]
    for line in asked[:2]:
        (folder / line["file"]).unlink()
    named = [
        "--protocol",
        "world",
        "--annotations",
        str(folder / "manifest.jsonl"),
        "--model",
        str(model_folder),
    ]
    command = ["eval", "qa", *named, "--videos", str(folder), "--allow-missing"]
    assert main([*command, "1"]) == 4
    assert "2 of 20 clips cannot be read (" in (err := capsys.readouterr().err)
    assert all(f"{line['id']}: missing" in err for line in asked[:2])
    known = asked[2]
    report = {
        "format": "vlm-overlap/1",
        "first_sha256": "a" * 64,
        "num_first": 9,
        "by": {"id": 1},
        "captions": None,
        "unreadable": {"first": {}, "second": {}},
        "matches": [{"by": "id", "first": "x.mp4", "second": known["file"], "value": 1.0}],
        "second_videos": [line["file"] for line in lines],
    }
    (tmp_path / "overlap.json").write_text(json.dumps(report))
    out = tmp_path / "card.json"
    quick = ("--set", "bootstrap.resamples=100", "--overlap", str(tmp_path / "overlap.json"))
    assert main([*command, "2", *quick, "--out", str(out)]) == 0
    card = read_card(out)
    assert len(card["data"]["missing"]) == 2
    assert (card["leakage"]["status"], card["leakage"]["videos_shared"]) == ("checked", 1)
    assert card["leakage"]["videos"] == len(asked) - 2


def test_the_protocol_can_be_changed_and_the_card_says_so(world_folder, model_folder, tmp_path, capsys):
    files = ("--annotations", str(world_folder / "manifest.jsonl"), "--videos", str(world_folder))
    asked = ["eval", "qa", "--protocol", "world", *files, "--model", str(model_folder)]
    outs = [str(tmp_path / name) for name in ("first.json", "second.json")]
    assert main([*asked, "--set", "bootstrap.resamples=100", "--out", outs[0]]) == 0
    assert main([*asked, "--set", "bootstrap.resamples=100", "--set", "trim_s=2", "--out", outs[1]]) == 0
    first, second = (read_card(tmp_path / name) for name in ("first.json", "second.json"))
    assert (
        first["protocol"]["bootstrap"] == {"resamples": 100, "seed": 0} and "trim_s" not in first["protocol"]
    )
    assert second["protocol"]["trim_s"] == 2
    assert main(["eval", "compare", *outs]) == 4
    assert "trim_s" in capsys.readouterr().err
    assert main([*asked, "--set", "frame=4"]) == 2
    assert "did you mean 'frames'" in capsys.readouterr().err


def test_answers_from_a_file(tmp_path, capsys, on_the_page):
    questions = [{"question": "what?", "answer": "dog"}, {"question": "how many?", "answer": "two"}]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "p.json").write_text(json.dumps([{"answer": "The dog"}, {"answer": "3"}]))
    (tmp_path / "l.json").write_text(json.dumps(["dog", "cat"]))
    named = ["--predictions", "p.json", "--annotations", "q.json", "--answer-list", "l.json"]
    files = [word if word.startswith("--") else str(tmp_path / word) for word in named]
    out = tmp_path / "card.json"
    assert main(["eval", "qa", *files, "--out", str(out), "--json"]) == 0
    card = read_card(out)
    assert json.loads(capsys.readouterr().out) == card
    assert "exact match" in on_the_page(out, "results")
    assert card["results"]["answers"]["all"]["accuracy"]["value"] == 0.5
    assert card["results"]["answers"]["all"]["answer_coverage"]["value"] == 0.5
    (tmp_path / "p.json").write_text("[]")
    assert main(["eval", "qa", *files]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--annotations", "a"], "missing --protocol, --videos, --model (or --predictions)"),
        (["--annotations", "a", "--predictions", "p", "--model", "m"], "stands for a model"),
        (["--annotations", "a", "--predictions", "p", "--overlap", "o"], "nor with --overlap"),
        (
            ["--annotations", "a", "--predictions", "p", "--protocol", "msrvtt-qa", "--answers", "x"],
            "leave it",
        ),
        (["--annotations", "a", "--answer-list", "l", "--model", "m"], "go with --predictions"),
        (["--annotations", "a", "--predictions", "p", "--set", "frames=4"], "name one: --protocol"),
        ([], "--annotations"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    assert main(["eval", "qa", *arguments]) == 2
    assert message in capsys.readouterr().err
