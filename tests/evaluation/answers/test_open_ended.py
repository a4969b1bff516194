"""Free answers from files: layouts as they occur, coverage, kinds, confidence, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlm.errors import InvalidInput
from vlm.evaluation import compare_cards, evaluate_answers, render_card, render_comparison
from vlm.evaluation.answers.files import read_answer_list, read_questions
from vlm.evaluation.protocol import BootstrapSettings
from vlm.metrics import answer_coverage

QUICK = BootstrapSettings(resamples=100)
QUESTIONS = [
    {"question_id": 7, "video": "a.mp4", "question": "What is it?", "answer": "a dog"},
    {"question_id": 8, "video": "a.mp4", "question": "how many dogs", "answer": "two"},
    {"question_id": 9, "video": "b.mp4", "question": "what plays?", "answer": ["guitar", "guitars"]},
    {"question_id": 10, "video": "b.mp4", "question": "is it red?", "answer": "no"},
]


@pytest.fixture
def write(tmp_path):
    def file(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return file


@pytest.fixture
def card_of(write):
    def make(predictions, answers=None, questions=QUESTIONS):
        known = write("list.json", answers) if answers is not None else None
        files = write("predictions.json", predictions), write("questions.json", questions)
        return evaluate_answers(*files, known, bootstrap=QUICK)

    return make


GIVEN = [
    {"question_id": 10, "answer": "yes", "confidence": 0.3},
    {"question_id": 9, "answer": "Guitars!", "confidence": 0.8},
    {"question_id": 8, "answer": "2", "confidence": 0.9},
    {"question_id": 7, "answer": "dog", "confidence": 0.6},
]


def test_accuracy_by_kind_and_by_video(card_of):
    card = card_of(GIVEN)
    kinds = card["results"]["answers"]
    assert {kind: block["accuracy"]["value"] for kind, block in kinds.items()} == {
        "all": 0.75, "what": 1.0, "how": 1.0, "is": 0.0,
    }  # fmt: skip
    assert [block["num_questions"] for block in kinds.values()] == [4, 1, 1, 2]
    # two videos: the interval is over (1, 1) and (1, 0), not over four questions
    assert (kinds["all"]["accuracy"]["low"], kinds["all"]["accuracy"]["high"]) == (0.5, 1.0)
    assert (card["protocol"]["num_questions"], card["protocol"]["num_items"]) == (4, 2)
    assert card["per_query"]["answers"]["all"] == {"right": [1, 1, 1, 0], "groups": [0, 0, 1, 1]}


def test_confidence(card_of):
    card = card_of(GIVEN)
    assert card["calibration"]["ece"]["value"] == pytest.approx((0.4 + 0.1 + 0.2 + 0.3) / 4)
    assert 0 < card["calibration"]["ece_if_calibrated"]["value"] < 1
    assert sum(row["num_questions"] for row in card["calibration"]["bins"]) == 4
    assert card["abstention"]["aurc"]["value"] == card["abstention"]["aurc_best"]["value"] == 0.25 / 4
    assert card["abstention"]["aurc_unordered"]["value"] == 0.25
    assert card["abstention"]["curve"][-1] == {"coverage": 1.0, "risk": 0.25}
    text = render_card(card)
    for part in ("exact match: 4 questions, 2 clips", "calibration error 25.0", "at best 6.2", "how"):
        assert part in text
    plain = card_of([{"question_id": row["question_id"], "answer": row["answer"]} for row in GIVEN])
    assert not {"calibration", "abstention"} & set(plain)


def test_answers_outside_a_list_cannot_be_given(card_of):
    card = card_of(
        [*GIVEN[:3], {"question_id": 7, "answer": "", "confidence": 0.0}], {"2": 0, "guitar": 1, "yes": 2}
    )
    kinds = card["results"]["answers"]
    assert kinds["all"]["answer_coverage"]["value"] == 0.5
    assert kinds["is"]["answer_coverage"]["value"] == 0.0
    assert card["data"]["unanswered"] == 1
    assert card["data"]["answer_list"]["num_answers"] == 3
    assert card["data"]["answer_list"]["answers_outside"] == 1  # "guitars"; an abstention is not outside
    assert "answer coverage" in render_card(card)


def test_lines_without_identifiers_and_a_type_of_answer(write):
    """MSRVTT-QA as jsonl: no question_id, a video_id, and answer_type; ActivityNet-QA numbers its types."""
    rows = [
        {"answer": "couch", "question": "what is it?", "video_id": "video6513", "answer_type": "what"},
        {"answer": "3", "question": "how many?", "video_id": "video6513", "answer_type": "how"},
        {"answer": "yes", "question": "is it?", "video_name": "x", "type": 3},
    ]
    questions = read_questions(write("q.jsonl", "\n".join(map(json.dumps, rows)) + "\n"))
    assert questions.kinds == ("what", "how", "3")
    assert questions.groups.tolist() == [0, 0, 1]
    answers = write("p.jsonl", '{"answer": "couch"}\n\n{"answer": "three"}\n{"answer": "Yes."}\n')
    card = evaluate_answers(answers, write("q.json", rows), bootstrap=QUICK)
    assert card["results"]["answers"]["all"]["accuracy"]["value"] == 1.0


def test_questions_and_answers_in_two_files(write):
    asked = [{"question": "is it?", "question_id": "v_1"}, {"question": "what?", "question_id": "v_2"}]
    right = [
        {"answer": "red", "type": 4, "question_id": "v_2"},
        {"answer": "yes", "type": 3, "question_id": "v_1"},
    ]
    files = write("q.json", asked), write("a.json", right)
    questions = read_questions(*files)
    assert (questions.answers, questions.kinds) == ((("yes",), ("red",)), ("3", "4"))
    given = write(
        "p.json", [{"question_id": "v_1", "answer": "yes"}, {"question_id": "v_2", "answer": "blue"}]
    )
    card = evaluate_answers(given, files[0], answers=files[1], bootstrap=QUICK)
    assert card["results"]["answers"]["all"]["accuracy"]["value"] == 0.5
    assert len(card["protocol"]["answers_sha256"]) == 64
    with pytest.raises(InvalidInput, match="entry 1: expected a question and its answer"):
        read_questions(files[0], write("a.json", right[1:]))


def test_public_annotations(shared):
    """MSRVTT-QA: of 12,278 questions for validation the 1,500 usual answers can answer 93 %."""
    folder = shared / "annotations"
    questions = read_questions(folder / "msrvtt_qa" / "val.jsonl")
    assert len(questions.ids) == 12278
    assert set(questions.kinds) == {"what", "who", "how", "when", "where"}
    known = read_answer_list(folder / "msrvtt_qa" / "train_ans2label.json")
    assert len(known) == 1500
    assert answer_coverage(questions.answers, known).mean() == pytest.approx(0.930, abs=5e-4)
    both = (folder / "activitynet_qa" / f"test_{part}.json" for part in "qa")
    questions = read_questions(*both)
    assert (len(questions.ids), len(np.unique(questions.groups))) == (8000, 800)


def test_two_models_on_the_same_questions(card_of):
    random = np.random.default_rng(0)
    questions = [{"question": "who?", "answer": "yes"} for _ in range(300)]
    cards = [
        card_of(
            [{"answer": "yes" if hit else "no"} for hit in random.random(300) < rate], questions=questions
        )
        for rate in (0.4, 0.7)
    ]
    entry = compare_cards(*cards)["differences"]["answers"]["all"]["accuracy"]
    assert entry["value"] == pytest.approx(entry["second"] - entry["first"])
    assert 0.1 < entry["low"] < entry["value"] < entry["high"] < 0.5
    assert "answers, all" in render_comparison(compare_cards(*cards))
    with pytest.raises(InvalidInput, match="num_questions: 300 and 4"):
        compare_cards(cards[0], card_of(GIVEN))


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (GIVEN[:3], "1 of 4 questions have no answer, 0 answers have no question, such as 7"),
        ([*GIVEN, {"question_id": 99, "answer": "x"}], "1 answers have no question, such as 99"),
        ([*GIVEN, GIVEN[0]], "'10' stands there twice"),
        ([{"answer": "x"}] * 3, "or 4 entries without, got 0 in 3"),
        ([*GIVEN[:3], {"answer": "dog"}], "got 3 in 4 entries"),
        ([*GIVEN[:3], {"question_id": 7, "answer": 3}], "question 7: expected an answer as text"),
        ([*GIVEN[:3], {"question_id": 7, "answer": "x"}], "a confidence in .* with every answer"),
        ([*GIVEN[:3], {"question_id": 7, "answer": "x", "confidence": 1.2}], "a confidence in"),
        ([*GIVEN[:3], {"question_id": 7, "answer": "x", "confidence": float("nan")}], "a confidence in"),
        ([], "at least one"),
        ("{", "expected JSON"),
        ("3", "list of objects"),
    ],
)
def test_answers_that_do_not_fit_are_refused(card_of, predictions, message):
    with pytest.raises(InvalidInput, match=message):
        card_of(predictions)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([{"question": "what?"}], "entry 0: expected a question and its answer"),
        ([{"question": "what?", "answer": []}], "entry 0"),
        ([{"answer": "x"}], "entry 0"),
        ([{"question": "a", "answer": "x", "question_id": 1}] * 2, "'1' stands there twice"),
        ([], "at least one"),
    ],
)
def test_questions_that_are_none(write, questions, message):
    with pytest.raises(InvalidInput, match=message):
        read_questions(write("q.json", questions))


def test_lists_that_are_none(card_of):
    for answers in ([], "word", [1], {}):
        with pytest.raises(InvalidInput, match="list of answers"):
            card_of(GIVEN, answers)
