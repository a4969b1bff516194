"""`vlm eval qa` on the world's questions, and models whose answers are known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.cli import main
from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation import load_protocol, read_card
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


def test_what_cannot_be_measured_is_refused(ask, data, monkeypatch):
    with pytest.raises(InvalidInput, match="not finite"):
        ask(lambda *_: math.nan)
    monkeypatch.setattr(Chooser, "capabilities", frozenset({"search"}))
    with pytest.raises(CapabilityError, match="cannot choose among answers; it can: search"):
        ask(lambda *_: 0.0)


def test_program(world_folder, model_folder, tmp_path, capsys):
    out = tmp_path / "card.json"
    manifest = world_folder / "manifest.jsonl"
    named = ["--protocol", "world", "--annotations", str(manifest), "--model", str(model_folder)]
    assert main(["eval", "qa", *named, "--videos", str(world_folder), "--out", str(out)]) == 0
    block = read_card(out)["results"]["multiple_choice"]["all"]
    assert block["accuracy"]["low"] <= block["chance"]["value"] <= block["accuracy"]["high"]
    assert "guessing" in capsys.readouterr().out
    assert main(["eval", "qa", *named, "--videos", str(tmp_path)]) == 4
    assert "20 of 20 clips cannot be read" in capsys.readouterr().err
