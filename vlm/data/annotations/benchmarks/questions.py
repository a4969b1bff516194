"""Questions about videos, open and multiple choice, in the layouts that their files circulate in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.data.annotations.benchmarks import unified
from vlm.data.annotations.benchmarks.files import AnnotationFiles, bad, load_json
from vlm.data.annotations.benchmarks.records import Question
from vlm.data.annotations.rows import read_text, split_lines


def read_questions(
    files: AnnotationFiles,
    names: Sequence[str],
    *,
    answers: Sequence[str] = (),
    mapping: Sequence[str] = (),
    part: str | None = None,
    numbered: str = "video{}",
) -> list[Question]:
    """Read questions.

    Args:
        files: The file that holds the questions, or its folder.
        names: What the file may be called in a folder.
        answers: What the file with the answers may be called, where they are apart (ActivityNet-QA).
        mapping: What a table from video numbers to names may be called (MSVD-QA's ``youtube_mapping.txt``).
        part: ``train``, ``val`` or ``test``, where the file holds all three.
        numbered: How a video is called of which the file says only a number.

    Raises:
        DataError: A file is missing, is a pickle or of no known layout, or questions and answers do not fit.
    """
    path = files.main(names)
    value = load_json(path)
    apart = files.companion(answers)
    table = files.companion(mapping)
    known = _read_mapping(table) if table is not None else {}
    try:
        found = _parse(path, value, part, numbered, apart)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise bad(path, f"a question is not as its layout says: {error!r}") from error
    if not found:
        raise bad(path, "holds no questions")
    twice = [name for name, count in Counter(question.question_id for question in found).items() if count > 1]
    if twice:
        raise bad(path, f"{len(twice)} question ids stand for several questions, such as {twice[0]!r}")
    return [_named(question, known.get(question.video, question.video)) for question in found]


def read_answer_list(path: Path) -> list[str]:
    """Return the answers that a model may choose from: a JSON list, or an object from answers to numbers.

    Raises:
        DataError: It is neither (``bad_annotations``).
    """
    value = load_json(path)
    names = sorted(value, key=value.__getitem__) if isinstance(value, dict) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise bad(path, "expected a list of answers, or an object from answers to numbers")
    return names


def answer_coverage(questions: Sequence[Question], known: Sequence[str]) -> float:
    """Return the share of questions with an answer in the list; the others are always answered wrongly."""
    inside = set(known)
    return sum(not inside.isdisjoint(question.answers) for question in questions) / len(questions)


def _parse(path: Path, value: Any, part: str | None, numbered: str, apart: Path | None) -> list[Question]:
    if unified.is_unified(value):
        return unified.parse_questions(value)
    if isinstance(value, dict) and "vocab" in value:
        return _numbered_answers(value, part or "test")
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        raise bad(path, "of no known layout of questions; expected a list of objects")
    first = value[0]
    if "video_name" in first:
        return _apart(path, value, apart)
    if "options" in first or isinstance(first.get("caption"), list):
        return [_choice(row, place) for place, row in enumerate(value)]
    name: Callable[[Any], str] = lambda row: _video(row, numbered)  # noqa: E731
    if isinstance(first.get("question"), list):
        return [
            _open(name(row), question, answer, f"{name(row)}_{place}")
            for row in value
            for place, (question, answer) in enumerate(zip(row["question"], row["answer"], strict=True))
        ]
    return [
        _open(
            name(row),
            row["question"],
            row["answer"],
            str(row.get("question_id", row.get("id", place))),
            str(row.get("answer_type", "")),
        )
        for place, row in enumerate(value)
    ]


def _open(video: str, text: str, answer: Any, question_id: str, kind: str = "") -> Question:
    answers = (answer,) if isinstance(answer, str) else tuple(answer)
    if not all(isinstance(item, str) and item for item in (video, text, *answers)) or not answers:
        raise ValueError(f"expected a video, a question and an answer, got {video!r}, {text!r}, {answer!r}")
    return Question(
        video=video, text=text, answers=tuple(dict.fromkeys(answers)), question_id=question_id, kind=kind
    )


def _video(row: Any, numbered: str) -> str:
    name = row["video"] if "video" in row else row["video_id"]
    return numbered.format(name) if isinstance(name, int) else str(name)


def _choice(row: Any, place: int) -> Question:
    candidates = tuple(row["options"] if "options" in row else row["caption"])
    answer = int(row["answer"])
    if len(candidates) < 2 or not 0 <= answer < len(candidates) or not all(map(str, candidates)):
        raise ValueError(f"expected an answer among the candidates, got {answer} of {len(candidates)}")
    return Question(
        video=row["video"] if "video" in row else row["clip_name"],
        text=str(row.get("question", "")),
        answers=(candidates[answer],),
        question_id=str(row.get("qid", row.get("question_id", place))),
        candidates=candidates,
        answer_index=answer,
    )


def _apart(path: Path, rows: list[Any], apart: Path | None) -> list[Question]:
    """ActivityNet-QA: questions in one file, answers in the other, joined by ``question_id``."""
    if apart is None:
        raise bad(path, "the answers stand in a file of their own, which is not beside it")
    given = {row["question_id"]: row for row in load_json(apart)}
    absent = [row["question_id"] for row in rows if row["question_id"] not in given]
    spare = given.keys() - {row["question_id"] for row in rows}
    if absent or spare:
        example = absent[0] if absent else min(spare)
        raise bad(
            apart,
            f"{len(absent)} questions have no answer and {len(spare)} answers have no question, "
            f"such as {example}",
        )
    found = []
    for row in rows:
        answer = given[row["question_id"]]
        kind = str(answer.get("type", ""))
        found.append(_open(row["video_name"], row["question"], answer["answer"], row["question_id"], kind))
    return found


def _numbered_answers(value: Any, part: str) -> list[Question]:
    """VIOLET's files: all parts in one, the answers as numbers of a vocabulary."""
    vocabulary = value["vocab"]
    if isinstance(vocabulary, dict):
        words = {number: word for word, number in vocabulary.items()}
    else:
        words = dict(enumerate(vocabulary))
    return [
        _open(row["video"], row["question"], words[row["answer"]], str(place))
        for place, row in enumerate(value[part])
        if row["answer"] in words
    ]


def _read_mapping(path: Path) -> dict[str, str]:
    """MSVD's table: a line holds a video's name and its number, ``-4wsuPCjDBc_5_15 vid1``."""
    rows = [line.split() for line in split_lines(read_text(path)) if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise bad(path, "expected two words a line, the video's name and its number")
    return {number: name for name, number in rows}


def _named(question: Question, video: str) -> Question:
    if video == question.video:
        return question
    return Question(
        video=video,
        text=question.text,
        answers=question.answers,
        question_id=question.question_id,
        kind=question.kind,
        candidates=question.candidates,
        answer_index=question.answer_index,
    )
