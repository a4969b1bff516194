"""Questions with their answers, and what a model answered, as files of common layouts hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import InvalidInput
from vlm.evaluation.protocol import Protocol
from vlm.evaluation.scores.files import parse_json, read_text
from vlm.metrics.matrices import Floats, Ints

_CLIP_FIELDS = ("video", "video_id", "video_name", "image")
_KIND_FIELDS = ("answer_type", "type")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenQuestions:
    """Questions with free answers; all are (questions,).

    Attributes:
        ids: What predictions name them by.
        answers: The answers that count as right, at least one each.
        kinds: The annotations' type of answer, or the question's first word.
        groups: Which video each is about; a question without one is by itself.
    """

    ids: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    groups: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What was answered, in the questions' order, and how sure the model was; None where it does not say."""

    texts: tuple[str, ...]
    confidences: Floats | None


def read_questions(path: Path, answers_path: Path | None = None) -> OpenQuestions:
    """Read questions: a JSON list, or JSON lines, of ``question`` and ``answer``.

    ``answer`` is a text or a list of texts. Optional are ``question_id``, the clip (``video``, ``video_id``
    or ``video_name``) and the kind (``answer_type`` or ``type``).

    Args:
        path: The questions.
        answers_path: Their answers, where these are a file of their own, joined by ``question_id``.

    Raises:
        InvalidInput: A file is missing, empty, or an entry is no question with an answer.
    """
    rows = _rows(path)
    if answers_path is not None:
        found = {str(row.get("question_id")): row for row in _rows(answers_path)}
        rows = [row | found.get(str(row.get("question_id")), {}) for row in rows]
    ids, answers, kinds, clips = [], [], [], []
    for number, row in enumerate(rows):
        question, answer = row.get("question"), row.get("answer")
        accepted: Any = [answer] if isinstance(answer, str) else answer
        if not isinstance(question, str) or not _is_texts(accepted):
            raise InvalidInput(
                f"{path}: entry {number}: expected a question and its answer, got {json.dumps(row)[:200]}"
            )
        ids.append(str(row.get("question_id", number)))
        answers.append(tuple(accepted))
        kinds.append(_kind(row, question))
        clips.append(str(next((row[field] for field in _CLIP_FIELDS if field in row), f"question {number}")))
    _check_unique(path, ids)
    return OpenQuestions(ids=tuple(ids), answers=tuple(answers), kinds=tuple(kinds), groups=_numbered(clips))


def read_benchmark_questions(protocol: Protocol, annotations: Path) -> tuple[OpenQuestions, str]:
    """Read the open questions of a benchmark in any layout they circulate in, and a hash of what they say.

    Args:
        protocol: Of the task ``open-ended``.
        annotations: The questions, companions lying beside them, or the folder of all.

    Raises:
        InvalidInput: They cannot be used, or are not those that the protocol expects.
    """
    from vlm.data.annotations.benchmarks import Question, content_hash, video_key
    from vlm.evaluation.benchmarks.reading import (  # brings torch, which files of our own do not need
        read_records,
        require_counts,
    )

    found = read_records(protocol, annotations)
    require_counts(protocol, found)
    asked = [record for record in found.records if isinstance(record, Question)]
    chosen = next((question.question_id for question in asked if question.candidates), None)
    if chosen is not None:
        raise InvalidInput(f"{annotations}: question {chosen} has candidates; open answers have none")
    questions = OpenQuestions(
        ids=tuple(question.question_id for question in asked),
        answers=tuple(question.answers for question in asked),
        kinds=tuple(question.kind or _first_word(question.text) for question in asked),
        groups=_numbered([video_key(question.video) for question in asked]),
    )
    return questions, content_hash(asked)


def read_predictions(path: Path, ids: Sequence[str]) -> Predictions:
    """Read answers: a JSON list, or JSON lines, of ``question_id``, ``answer`` and perhaps ``confidence``.

    Without any ``question_id`` they are in the questions' order. An empty answer abstains and is wrong.

    Raises:
        InvalidInput: The file cannot be read, or does not answer every question exactly once.
    """
    rows = _rows(path)
    named = [str(row["question_id"]) for row in rows if "question_id" in row]
    if not named and len(rows) == len(ids):
        named = list(ids)
    if len(named) != len(rows):
        raise InvalidInput(
            f"{path}: expected a question_id in every entry, or {len(ids)} entries without, got "
            f"{len(named)} in {len(rows)} entries"
        )
    _check_unique(path, named)
    place = {name: number for number, name in enumerate(named)}
    missing, unknown = [name for name in ids if name not in place], set(named) - set(ids)
    if missing or unknown:
        examples = [*missing, *sorted(unknown)][:3]
        raise InvalidInput(
            f"{path}: {len(missing)} of {len(ids)} questions have no answer, {len(unknown)} answers have no "
            f"question, such as {', '.join(examples)}; what a model does not answer is an empty answer"
        )
    ordered = [rows[place[name]] for name in ids]
    texts: list[Any] = [row.get("answer") for row in ordered]
    if not all(isinstance(text, str) for text in texts):
        wrong = next(name for name, text in zip(ids, texts, strict=True) if not isinstance(text, str))
        raise InvalidInput(f"{path}: question {wrong}: expected an answer as text")
    return Predictions(texts=tuple(texts), confidences=_confidences(path, ordered))


def read_answer_list(path: Path) -> list[str]:
    """Read the answers that a model chooses from: a JSON list, or an object whose keys they are.

    Raises:
        InvalidInput: The file cannot be read or holds no answers.
    """
    content = parse_json(path, read_text(path), "a list of answers")
    answers = list(content) if isinstance(content, dict) else content
    if not _is_texts(answers):
        raise InvalidInput(f"{path}: expected a JSON list of answers, or an object with answers as keys")
    return list(answers)


def _rows(path: Path) -> list[dict[str, Any]]:
    text, what = read_text(path), "a list of objects or an object a line"
    if text.lstrip().startswith("["):
        rows = parse_json(path, text, what)
    else:
        rows = [parse_json(path, line, what) for line in text.split("\n") if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InvalidInput(f"{path}: expected a JSON list of objects, or an object a line, and at least one")
    return list(rows)


def _confidences(path: Path, rows: list[dict[str, Any]]) -> Floats | None:
    values = [row.get("confidence") for row in rows]
    if all(value is None for value in values):
        return None
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise InvalidInput(f"{path}: expected a confidence in [0, 1] with every answer, or with none")
    return np.asarray(values, np.float64)


def _kind(row: dict[str, Any], question: str) -> str:
    named = next((str(row[field]) for field in _KIND_FIELDS if row.get(field) not in (None, "")), "")
    return named or _first_word(question)


def _first_word(question: str) -> str:
    return (question.lower().split() or ["(empty)"])[0].strip("\"'?,.")


def _numbered(clips: Sequence[str]) -> Ints:
    return np.unique(np.asarray(clips), return_inverse=True)[1].astype(np.int64)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _check_unique(path: Path, ids: list[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InvalidInput(f"{path}: question_id {name!r} stands there twice")
        seen.add(name)
