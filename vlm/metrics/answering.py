"""Accuracy of answers: chosen among candidates, or written and compared after normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics.matrices import Floats

_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_PERIODS = re.compile(r"\.(?!\d)")
_PUNCTUATION = re.compile(r"[^\w\s':.]|_")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


def _contractions() -> dict[str, str]:
    """Return contractions without their apostrophe, unless that is another word ("well", "its", "were")."""
    stems = {
        "n't": "ai are ca could did do does had has have is might must need sha should was were wo would",
        "'ve": "could i might must should they we what who would you",
        "'s": "he here how she that there what when where who why",
        "'ll": "it that they what who you",
        "'re": "they what you",
        "'d": "he how it there they who you",
        "'m": "i",
    }
    pairs = [(stem, ending) for ending, words in stems.items() for stem in words.split()]
    pairs += [("o", "'clock"), ("y", "'all"), ("ma", "'am")]
    return {stem + ending.replace("'", ""): stem + ending for stem, ending in pairs}


_CONTRACTIONS = _contractions()


def normalise_answer(text: str) -> str:
    """Return an answer as the VQA evaluation compares it.

    Lower case; periods dropped but for decimals, commas within numbers dropped, all other punctuation except
    apostrophes and colons opened into spaces; number words up to ten as digits; no articles; apostrophes of
    contractions restored.

    >>> normalise_answer("The two dogs, dont!")
    "2 dogs don't"

    Source: Antol et al. 2015, VQA, with the evaluation rules published on visualqa.org.
    """
    text = _THOUSANDS.sub("", text.lower().replace("\u2019", "'"))
    words = _PUNCTUATION.sub(" ", _PERIODS.sub("", text)).split()
    kept = (_DIGITS.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Floats:
    """Return 1 where a prediction equals one of the question's answers after normalisation; (questions,).

    An empty prediction is an abstention and always wrong.

    Raises:
        ValueError: The lengths differ, there is no question, or a question has no answer.
    """
    if len(predictions) != len(answers) or not len(answers):
        raise ValueError(
            f"expected one prediction a question and at least one, got {len(predictions)} for {len(answers)}"
        )
    empty = next((number for number, accepted in enumerate(answers) if not accepted), None)
    if empty is not None:
        raise ValueError(f"question {empty}: expected at least one right answer, got none")
    return np.asarray(
        [
            bool(prediction.strip()) and _compared(prediction) in map(_compared, accepted)
            for prediction, accepted in zip(predictions, answers, strict=True)
        ],
        np.float64,
    )


def answer_coverage(answers: Sequence[Sequence[str]], known: Iterable[str]) -> Floats:
    """Return 1 where a list of known answers holds one that is right; the rest cannot be answered by it.

    Args:
        answers: The right answers of each question.
        known: The list that a model chooses from.
    """
    listed = {_compared(answer) for answer in known}
    return np.asarray(
        [any(_compared(answer) in listed for answer in accepted) for accepted in answers], np.float64
    )


def choice_accuracy(scores: Sequence[ArrayLike], answers: Sequence[int]) -> Floats:
    """Return the probability that each question is answered right, ties broken at random; (questions,).

    Args:
        scores: The candidates' scores of each question; their number may vary.
        answers: The right candidate's position.

    Raises:
        ValueError: The lengths differ, a question has no candidates, an answer is out of range, or a
            score is not finite.
    """
    if len(scores) != len(answers) or not len(scores):
        raise ValueError(
            f"expected one answer a question and at least one, got {len(answers)} for {len(scores)}"
        )
    right = np.empty(len(scores))
    for question, (row, answer) in enumerate(zip(scores, answers, strict=True)):
        candidates = np.asarray(row, np.float64)
        if candidates.ndim != 1 or not 0 <= answer < len(candidates):
            raise ValueError(
                f"question {question}: expected an answer in 0..{candidates.size - 1}, got {answer}"
            )
        if not np.isfinite(candidates).all():
            raise ValueError(f"question {question}: candidate scores are not finite: {candidates.tolist()}")
        best = candidates == candidates.max()
        right[question] = best[answer] / best.sum()
    return right


def _compared(text: str) -> str:
    """Return the normalised answer, or the text itself where that leaves nothing of it (the answer "A")."""
    return normalise_answer(text) or text.strip().lower()


def choice_chance(num_candidates: ArrayLike) -> float:
    """Return the accuracy of guessing: the mean of one over each question's number of candidates."""
    return float(np.mean(1.0 / np.asarray(num_candidates, np.float64)))
