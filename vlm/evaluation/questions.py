"""Multiple choice: every question of every clip, its candidates scored by the model, one card."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vlm.errors import CapabilityError, DataError, InvalidInput
from vlm.evaluation.answers.confidence import abstention_section, calibration_section
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.card import FORMAT, Card, as_json, sections
from vlm.evaluation.card.leakage import Overlap, leakage_section
from vlm.evaluation.dataset import refuse_missing
from vlm.evaluation.features import Loader, count_cut
from vlm.evaluation.protocol import Protocol as EvaluationProtocol
from vlm.metrics import choice_accuracy, choice_chance
from vlm.metrics.matrices import Floats, Ints
from vlm.models.video_text_model import EMBEDDING_SHARE, MATCHING_SHARE, VideoTextModel
from vlm.progress import progress_bar
from vlm.text import TruncationWarning, join_statement
from vlm.types import VideoTextEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceQuestion:
    """A question with candidates.

    Attributes:
        clip: Which of the set's clips it is about.
        kind: What is asked for, for the table by kind.
        text: The question; empty if each candidate is a full statement.
        candidates: What to choose from.
        answer: Place of the right one.
    """

    clip: int
    kind: str
    text: str
    candidates: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionSet:
    """Clips and questions about them; ``groups`` joins a clip and its twin for resampling."""

    clip_ids: tuple[str, ...]
    paths: tuple[Path, ...]
    groups: tuple[int, ...]
    questions: tuple[ChoiceQuestion, ...]
    annotations_sha256: str


@runtime_checkable
class PartsChooser(Protocol):
    """A model that tells the two scores it chooses by apart; see ``VideoTextModel.candidate_parts``."""

    def candidate_parts(
        self, video: Tensor, questions: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the matching and the contrastive scores of every candidate of every question."""


@dataclass(slots=True)
class _Replies:
    """Questions that were asked, their candidates' scores, and the parts of these, in the same order."""

    asked: list[ChoiceQuestion] = field(default_factory=list)
    scores: list[Floats] = field(default_factory=list)
    parts: dict[str, list[Floats]] = field(default_factory=dict)
    rejected: list[tuple[int, str]] = field(default_factory=list)


class _Chooser(Protocol):
    def score_candidates(
        self, video: Tensor, questions: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[Tensor]: ...


def evaluate_choices(
    model: VideoTextEncoder,
    data: QuestionSet,
    protocol: EvaluationProtocol,
    load: Loader,
    *,
    source: str = "",
    allow_missing: bool | int = False,
    overlap: Overlap | None = None,
) -> Card:
    """Ask a model every question and make its card, with accuracy by kind beside guessing.

    Args:
        model: A model that can ``choose``.
        data: Clips and questions.
        protocol: How frames are sampled and intervals drawn.
        load: File and preprocessing → (t, 3, s, s) float32.
        source: How the model was named by the caller, for the card.
        allow_missing: Leave unreadable clips out (and list them) instead of failing; a number allows so many.
        overlap: What was found of the clips in the model's training set; without it the card says
            ``unchecked``.

    Raises:
        CapabilityError: The model cannot choose among candidates.
        InvalidInput: A clip cannot be read, a score is not finite, or the overlap is that of other videos.
    """
    if "choose" not in model.capabilities:
        raise CapabilityError(
            f"model {model.name!r} (kind {model.kind}) cannot choose among answers; "
            f"it can: {', '.join(sorted(model.capabilities)) or 'nothing'}"
        )
    began = time.perf_counter()
    replies = _ask_all(model, data, load, protocol.text_tokens)
    asked, rejected = replies.asked, replies.rejected
    unread = [(str(data.paths[clip]), reason) for clip, reason in rejected]
    refuse_missing(unread, len(data.paths), allow_missing)
    if not asked:
        raise InvalidInput("no question can be asked: the annotations hold none, or no clip can be read")
    card = _card(model, data, protocol, replies, overlap)
    seconds = time.perf_counter() - began
    card["model"] = sections.model_section(model, source)
    card["cost"] = {"total_s": round(seconds, 4), "ms_per_question": round(1000 * seconds / len(asked), 4)}
    return card


def _card(
    model: VideoTextEncoder,
    data: QuestionSet,
    protocol: EvaluationProtocol,
    replies: _Replies,
    overlap: Overlap | None,
) -> Card:
    asked, rejected = replies.asked, replies.rejected
    clips = sorted({question.clip for question in asked})
    return {
        "format": FORMAT,
        "protocol": _protocol_section(protocol, data, asked, model),
        "model": {},
        "results": {
            "multiple_choice": _accuracies(asked, replies.scores, data, protocol),
            "multiple_choice_parts": {
                name: _accuracies(asked, part, data, protocol)["all"] for name, part in replies.parts.items()
            },
        },
        **_confidence(asked, replies.scores),
        "per_query": {"multiple_choice": {"all": _outcomes(asked, replies.scores, data)}},
        "data": {
            "videos_expected": len(data.paths),
            "videos_decoded": len(data.paths) - len(rejected),
            "missing": [{"clip": data.clip_ids[clip], "reason": reason} for clip, reason in rejected],
            "statements_truncated": count_cut(model, _statements(asked), protocol.text_tokens),
        },
        "leakage": leakage_section(
            overlap,
            [data.paths[clip] for clip in clips],
            [question.candidates[question.answer] for question in asked],
        ),
        "deviations": protocol.deviations(model.preprocessing),
        "published": [describe_published(entry, protocol.num_trials) for entry in protocol.published],
        "environment": sections.environment(str(model.device), torch.get_num_threads()),
    }


def _statements(asked: list[ChoiceQuestion]) -> list[str]:
    return [join_statement(question.text, text) for question in asked for text in question.candidates]


def _ask_all(model: VideoTextEncoder, data: QuestionSet, load: Loader, max_tokens: int | None) -> _Replies:
    by_clip: dict[int, list[ChoiceQuestion]] = {}
    for question in data.questions:
        by_clip.setdefault(question.clip, []).append(question)
    replies = _Replies()
    with progress_bar(len(data.questions), "questions", "question") as bar, torch.inference_mode():
        for clip, questions in by_clip.items():
            try:
                video = load(data.paths[clip], model.preprocessing)
            except DataError as error:
                replies.rejected.append((clip, f"{error.reason}: {error}"))
                continue
            arguments = (
                video[None].to(model.device),
                [question.text for question in questions],
                [question.candidates for question in questions],
            )
            replies.asked += questions
            if isinstance(model, PartsChooser):
                pairs = _parts(model, arguments, max_tokens)
                for name, part in zip(("matching", "contrastive"), zip(*pairs, strict=True), strict=True):
                    replies.parts.setdefault(name, []).extend(_arrays(part))
                rows = [MATCHING_SHARE * matching + EMBEDDING_SHARE * shares for matching, shares in pairs]
            else:
                rows = cast(_Chooser, model).score_candidates(*arguments)
            replies.scores += _arrays(rows)
            bar.update(len(questions))
    return replies


def _parts(
    model: PartsChooser, arguments: tuple[Tensor, list[str], list[tuple[str, ...]]], max_tokens: int | None
) -> list[tuple[Tensor, Tensor]]:
    if not isinstance(model, VideoTextModel):  # only models with BERT's tokenizer are told where to cut
        return model.candidate_parts(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # counted instead, and in the card
        return model.candidate_parts(*arguments, max_tokens=max_tokens)


def _arrays(rows: Iterable[Tensor]) -> list[Floats]:
    return [row.float().cpu().numpy() for row in rows]


def _accuracies(
    asked: list[ChoiceQuestion], scores: list[Floats], data: QuestionSet, protocol: EvaluationProtocol
) -> dict[str, Any]:
    right, groups = _right(asked, scores), _groups(asked, data)
    sizes = np.asarray([len(question.candidates) for question in asked])
    kinds = np.asarray([question.kind for question in asked])
    table = {}
    for name in ("all", *sorted(set(kinds.tolist()))):
        inside = np.ones(len(asked), bool) if name == "all" else kinds == name
        table[name] = {
            "accuracy": as_json(protocol.bootstrap.mean(right[inside], groups[inside])),
            "chance": {"value": choice_chance(sizes[inside])},
            "most_frequent_place": {"value": _most_frequent_place(asked, inside)},
            "num_questions": int(inside.sum()),
        }
    return table


def _right(asked: list[ChoiceQuestion], scores: list[Floats]) -> Floats:
    try:
        return choice_accuracy(scores, [question.answer for question in asked])
    except ValueError as error:
        raise InvalidInput(f"multiple choice: {error}") from error


def _groups(asked: list[ChoiceQuestion], data: QuestionSet) -> Ints:
    return np.asarray([data.groups[question.clip] for question in asked], np.int64)


def _outcomes(asked: list[ChoiceQuestion], scores: list[Floats], data: QuestionSet) -> dict[str, Any]:
    return {"right": _right(asked, scores).tolist(), "groups": _groups(asked, data).tolist()}


def _confidence(asked: list[ChoiceQuestion], scores: list[Floats]) -> dict[str, Any]:
    """Return the sections on confidence: the chosen candidate's score, where scores are shares of one."""
    right, best = _right(asked, scores), np.asarray([row.max() for row in scores], np.float64)
    sections = {"abstention": abstention_section(best, right)}
    if best.min() >= 0 and best.max() <= 1:
        sections["calibration"] = calibration_section(best, right)
    return sections


def _most_frequent_place(asked: list[ChoiceQuestion], inside: Any) -> float:
    """Return the accuracy of always naming the place where the answer stands most often."""
    places = [question.answer for question, chosen in zip(asked, inside, strict=True) if chosen]
    return float(np.bincount(places).max() / len(places))


def _protocol_section(
    protocol: EvaluationProtocol, data: QuestionSet, asked: list[ChoiceQuestion], model: VideoTextEncoder
) -> dict[str, Any]:
    clips = {data.clip_ids[question.clip] for question in asked}
    return {
        "name": protocol.name,
        "version": protocol.version,
        "task": "multiple-choice",
        "layout": protocol.layout,
        **({"split": protocol.split} if protocol.split else {}),
        **({} if protocol.text_tokens is None else {"text_tokens": protocol.text_tokens}),
        "sampling": protocol.sampling,
        "frames": model.preprocessing.num_frames,
        **({} if protocol.trim_s is None else {"trim_s": protocol.trim_s}),
        "bootstrap": {"resamples": protocol.bootstrap.resamples, "seed": protocol.bootstrap.seed},
        "annotations_sha256": data.annotations_sha256,
        "gallery_sha256": hashlib.sha256("\n".join(sorted(clips)).encode()).hexdigest(),
        "num_questions": len(asked),
        "num_items": len(clips),
    }
