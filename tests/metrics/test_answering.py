"""Accuracy of choices by hand and under ties."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.metrics import answer_coverage, choice_accuracy, choice_chance, exact_match, normalise_answer


def test_by_hand():
    right = choice_accuracy([[1, 3, 2], [0.5, 0.5], [2, 2, 2, 1], [7]], [1, 0, 3, 0])
    assert right.tolist() == [1, 0.5, 0, 1]
    assert choice_accuracy([[1, 1, 1]], [2])[0] == pytest.approx(1 / 3)


def test_a_collapsed_model_is_at_chance():
    sizes = np.random.default_rng(0).integers(2, 6, 100)
    right = choice_accuracy([np.zeros(size) for size in sizes], [int(size) - 1 for size in sizes])
    assert right.mean() == pytest.approx(choice_chance(sizes))


@pytest.mark.parametrize(
    ("scores", "answers", "message"),
    [
        ([[1, 2]], [2], "question 0: expected an answer in 0..1, got 2"),
        ([[1, 2]], [-1], "question 0"),
        ([[1], []], [0, 0], "question 1"),
        ([[1, np.nan]], [0], "question 0: candidate scores are not finite"),
        ([[1, 2]], [0, 1], "got 2 for 1"),
        ([], [], "at least one"),
    ],
)
def test_wrong_input_is_refused(scores, answers, message):
    with pytest.raises(ValueError, match=message):
        choice_accuracy(scores, answers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog", "dog"), ("the  cat\n", "cat"), ("an", ""), ("", ""), ("Theatre", "theatre"),
        ("two", "2"), ("Ten men", "10 men"), ("none", "0"), ("someone", "someone"), ("eleven", "eleven"),
        ("100,978", "100978"), ("1,000,000", "1000000"), ("red, blue", "red blue"), ("a,b", "b"),
        ("3.5 meters.", "3.5 meters"), ("u.s.a.", "usa"), (".5", ".5"), ("5.", "5"),
        ("2:50 pm", "2:50 pm"), ("girl's", "girl's"), ("girls", "girls"), ("rock-n-roll", "rock n roll"),
        ("yes/no?", "yes no"), ("(left)", "left"), ("snake_case", "snake case"), ("caf\u00e9!", "caf\u00e9"),
        ("dont", "don't"), ("Cant", "can't"), ("wont", "won't"), ("its", "its"), ("theyre", "they're"),
        ("man\u2019s hat", "man's hat"), ("oclock", "o'clock"), ("well were ill", "well were ill"),
    ],
)  # fmt: skip
def test_normalisation_by_the_published_rules(text, expected):
    assert normalise_answer(text) == expected
    assert normalise_answer(expected) == expected  # once is enough


def test_exact_match_and_coverage_of_an_answer_list():
    answers = [["two"], ["a guitar", "guitars"], ["couch"], ["sing"]]
    assert exact_match(["2", "Guitar.", "sofa", "singing"], answers).tolist() == [1, 1, 0, 0]
    assert answer_coverage(answers, ["2", "the guitar", "play"]).tolist() == [1, 1, 0, 0]
    assert answer_coverage(answers, []).tolist() == [0, 0, 0, 0]
    assert exact_match(["A", "", " ", "an"], [["a"], ["the"], ["a"], ["the"]]).tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="got 1 for 4"):
        exact_match(["2"], answers)
    with pytest.raises(ValueError, match="question 1: expected at least one right answer"):
        exact_match(["2", "3"], [["2"], []])


def test_what_is_outside_the_list_is_always_wrong():
    """Answer-list models of the field: their ceiling is the list's coverage, whatever the model."""
    random = np.random.default_rng(0)
    answers = [[f"word{number}"] for number in random.zipf(1.5, 2000)]
    known = [f"word{number}" for number in range(1, 50)]
    covered = answer_coverage(answers, known)
    best = [accepted[0] if accepted[0] in known else known[0] for accepted in answers]
    assert exact_match(best, answers).mean() == covered.mean()
    assert 0.5 < covered.mean() < 0.95
