"""A card from free answers that somebody's model gave: exact match after normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import to_dict
from vlm.data.annotations.benchmarks import AnnotationFiles
from vlm.evaluation.answers.confidence import abstention_section, calibration_section
from vlm.evaluation.answers.files import (
    OpenQuestions,
    read_answer_list,
    read_benchmark_questions,
    read_predictions,
    read_questions,
)
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.card import FORMAT, Card, as_json, file_sha256, sections
from vlm.evaluation.card.leakage import leakage_section
from vlm.evaluation.protocol import BootstrapSettings, Protocol
from vlm.metrics import answer_coverage, exact_match
from vlm.metrics.matrices import Floats


def evaluate_answers(
    predictions: Path,
    annotations: Path,
    answer_list: Path | None = None,
    *,
    answers: Path | None = None,
    protocol: Protocol | None = None,
    bootstrap: BootstrapSettings | None = None,
) -> Card:
    """Make a card from answers and annotations.

    Args:
        predictions: What was answered; see ``read_predictions``.
        annotations: Questions and right answers; see ``read_questions``.
        answer_list: The answers that the model could choose from; see ``read_answer_list``. A protocol's own
            is taken where it lies beside the annotations.
        answers: The right answers, where they are not in the annotations' file; a protocol finds its own.
        protocol: The benchmark that the questions are of: read in its layouts, its counts compared.
        bootstrap: How intervals are drawn, by video; the protocol's if there is one.

    Raises:
        InvalidInput: A file cannot be used, the answers are not those to the questions, or the questions are
            not those that the protocol expects.
    """
    if bootstrap is None:
        bootstrap = BootstrapSettings() if protocol is None else protocol.bootstrap
    if protocol is not None and answer_list is None:
        answer_list = AnnotationFiles(annotations).companion(protocol.files.answer_list)
    questions, pinned = _asked(annotations, answers, protocol)
    given = read_predictions(predictions, questions.ids)
    known = read_answer_list(answer_list) if answer_list else None
    right = exact_match(given.texts, questions.answers)
    card: Card = {
        "format": FORMAT,
        "protocol": pinned
        | {
            "task": "open-ended",
            "normalisation": "vqa",
            "bootstrap": to_dict(bootstrap),
            "num_questions": len(right),
            "num_items": len(np.unique(questions.groups)),
        },
        "model": {"name": predictions.name, "predictions_sha256": file_sha256(predictions)},
        "results": {"answers": _by_kind(right, questions, known, bootstrap)},
        "data": {"unanswered": sum(not text.strip() for text in given.texts)},
        "leakage": leakage_section(None, ()),  # whose answers these are is not known, nor what taught it
        "published": []
        if protocol is None
        else [describe_published(entry, protocol.num_trials) for entry in protocol.published],
        "environment": sections.environment("cpu", 1),
        "per_query": {"answers": {"all": {"right": right.tolist(), "groups": questions.groups.tolist()}}},
    }
    if known is not None and answer_list is not None:
        card["data"]["answer_list"] = _listed(given.texts, known, answer_list)
    if given.confidences is not None:
        card["calibration"] = calibration_section(given.confidences, right)
        card["abstention"] = abstention_section(given.confidences, right)
    return card


def _asked(
    annotations: Path, answers: Path | None, protocol: Protocol | None
) -> tuple[OpenQuestions, dict[str, Any]]:
    """Return the questions, and what two cards must share of them."""
    if protocol is not None:
        questions, digest = read_benchmark_questions(protocol, annotations)
        named = {"name": protocol.name, "version": protocol.version, "split": protocol.split}
        return questions, named | {"annotations_sha256": digest}
    pinned = {"name": "answers", "version": 1, "annotations_sha256": file_sha256(annotations)}
    if answers is not None:
        pinned["answers_sha256"] = file_sha256(answers)
    return read_questions(annotations, answers), pinned


def _listed(given: Sequence[str], known: list[str], path: Path) -> dict[str, Any]:
    inside = answer_coverage([[text] for text in given if text.strip()], known)
    return {
        "sha256": file_sha256(path),
        "num_answers": len(known),
        "answers_outside": int(np.sum(1 - inside)),
    }


def _by_kind(
    right: Floats, questions: OpenQuestions, known: list[str] | None, bootstrap: BootstrapSettings
) -> dict[str, Any]:
    kinds = np.asarray(questions.kinds)
    covered = None if known is None else answer_coverage(questions.answers, known)
    table: dict[str, Any] = {}
    for name in ("all", *np.unique(kinds).tolist()):
        inside = np.ones(len(right), bool) if name == "all" else kinds == name
        interval = bootstrap.mean(right[inside], questions.groups[inside])
        table[name] = {"accuracy": as_json(interval), "num_questions": int(inside.sum())}
        if covered is not None:
            # an answer outside the list cannot be given, so this is also the ceiling
            table[name]["answer_coverage"] = {"value": float(covered[inside].mean())}
    return table
