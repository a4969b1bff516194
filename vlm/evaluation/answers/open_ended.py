"""A card from free answers that somebody's model gave: exact match after normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import to_dict
from vlm.evaluation.answers.confidence import abstention_section, calibration_section
from vlm.evaluation.answers.files import OpenQuestions, read_answer_list, read_predictions, read_questions
from vlm.evaluation.card import FORMAT, Card, as_json, file_sha256, sections
from vlm.evaluation.protocol import BootstrapSettings
from vlm.metrics import answer_coverage, exact_match
from vlm.metrics.matrices import Floats


def evaluate_answers(
    predictions: Path,
    annotations: Path,
    answer_list: Path | None = None,
    *,
    answers: Path | None = None,
    bootstrap: BootstrapSettings | None = None,
) -> Card:
    """Make a card from answers and annotations.

    Args:
        predictions: What was answered; see ``read_predictions``.
        annotations: Questions and right answers; see ``read_questions``.
        answer_list: The answers that the model could choose from; see ``read_answer_list``.
        answers: The right answers, where they are not in the annotations' file.
        bootstrap: How intervals are drawn, by video.

    Raises:
        InvalidInput: A file cannot be used, or the answers are not those to the questions.
    """
    bootstrap = bootstrap or BootstrapSettings()
    questions = read_questions(annotations, answers)
    given = read_predictions(predictions, questions.ids)
    known = read_answer_list(answer_list) if answer_list else None
    right = exact_match(given.texts, questions.answers)
    card: Card = {
        "format": FORMAT,
        "protocol": {
            "name": "answers",
            "version": 1,
            "task": "open-ended",
            "normalisation": "vqa",
            "bootstrap": to_dict(bootstrap),
            "annotations_sha256": file_sha256(annotations),
            **({"answers_sha256": file_sha256(answers)} if answers else {}),
            "num_questions": len(right),
            "num_items": len(np.unique(questions.groups)),
        },
        "model": {"name": predictions.name, "predictions_sha256": file_sha256(predictions)},
        "results": {"answers": _by_kind(right, questions, known, bootstrap)},
        "data": {"unanswered": sum(not text.strip() for text in given.texts)},
        "environment": sections.environment("cpu", 1),
        "per_query": {"answers": {"all": {"right": right.tolist(), "groups": questions.groups.tolist()}}},
    }
    if known is not None and answer_list is not None:
        listed = answer_coverage([[text] for text in given.texts if text.strip()], known)
        card["data"]["answer_list"] = {
            "sha256": file_sha256(answer_list),
            "num_answers": len(known),
            "answers_outside": int(np.sum(1 - listed)),
        }
    if given.confidences is not None:
        card["calibration"] = calibration_section(given.confidences, right)
        card["abstention"] = abstention_section(given.confidences, right)
    return card


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
