"""Multiple choice over an index: every choice becomes a statement, and the matching head judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from vlm.answering.evidence import decode_evidence, find_evidence
from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.text import join_statement
from vlm.types import Answer, Hit, Segment, VideoTextEncoder


@runtime_checkable
class Chooser(Protocol):
    """The part of a model that scores candidates; see ``VideoTextModel.score_candidates``."""

    def score_candidates(
        self, video: object, questions: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> Sequence[object]:
        """Return the scores of every candidate of every question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """A question's choices, best first, each with its score in [0, 1], and the moment they were judged on."""

    question: str
    answers: tuple[Answer, ...]
    evidence: Hit


def choose(
    searcher: SnapshotSearcher, question: str, choices: Sequence[str], *, video: str | None = None
) -> Choices:
    """Answer a multiple-choice question from the moment that fits one of its choices best.

    Args:
        searcher: The index and its model.
        question: The question; may be empty when the choices are statements by themselves.
        choices: Two or more different answers.
        video: Identifier of the video that is asked about, or None to look through all.

    Raises:
        CapabilityError: The model cannot choose.
        InvalidInput: There are fewer than two different choices, or nothing to look at.
        DataError: The evidence's file cannot be decoded any more.

    Source: Li et al. 2023, Unmasked Teacher, multiple choice on MSR-VTT (the weights of the two scores).
    """
    statements = state_choices(searcher.model, question, choices)
    hit = find_evidence(searcher, statements, video=video)
    return judge(searcher.model, question, choices, hit, decode_evidence(searcher, hit))


def state_choices(model: VideoTextEncoder, question: str, choices: Sequence[str]) -> list[str]:
    """Return what each choice claims, to be looked for; see `choose`, of which this is the first part.

    Raises:
        CapabilityError: The model cannot choose.
        InvalidInput: There are fewer than two different choices.
    """
    if "choose" not in model.capabilities or not isinstance(model, Chooser):
        raise CapabilityError(
            f"model {model.name!r} ({model.kind}) cannot choose among answers: it has no matching head; "
            "'vlm models list' shows which can"
        )
    texts = _stripped(choices)
    if len(set(texts)) < 2 or len(set(texts)) < len(texts) or not all(texts):
        raise InvalidInput(f"expected two or more different choices, got {list(choices)}")
    return [join_statement(question, text) for text in texts]


def judge(
    model: VideoTextEncoder, question: str, choices: Sequence[str], hit: Hit, frames: np.ndarray
) -> Choices:
    """Return the choices of `choose`, judged on `frames` (t, 3, h, w) of the moment that `hit` is."""
    import torch

    texts = _stripped(choices)
    clip = torch.from_numpy(frames[None]).to(model.device)
    scores = [float(score) for score in model.score_candidates(clip, [question], [texts])[0]]  # type: ignore[attr-defined]
    segment = Segment(video_id=hit.video_id, path=hit.path, start_s=hit.start_s, end_s=hit.end_s)
    answers = [
        Answer(text=text, score=score, evidence=(segment,)) for text, score in zip(texts, scores, strict=True)
    ]
    answers.sort(key=lambda answer: -answer.score)
    return Choices(question=question, answers=tuple(answers), evidence=hit)


def _stripped(choices: Sequence[str]) -> list[str]:
    return [choice.strip() for choice in choices]
