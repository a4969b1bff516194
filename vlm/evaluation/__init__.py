"""Evaluation cards: a model or score matrix measured by a pinned protocol, compared only with its equals.

`vlm.evaluation.runner` runs a model and needs torch; what is exported here does without.
"""

from vlm.evaluation.answers.open_ended import evaluate_answers
from vlm.evaluation.card import Card, read_card, write_card
from vlm.evaluation.card.table import render_card, render_comparison
from vlm.evaluation.compare import compare_cards
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.protocol import Protocol, load_protocol, protocol_files
from vlm.evaluation.scores.matrix import MatrixFiles, evaluate_scores

__all__ = [
    "Card",
    "EvaluationSet",
    "MatrixFiles",
    "Protocol",
    "compare_cards",
    "evaluate_answers",
    "evaluate_scores",
    "load_protocol",
    "protocol_files",
    "read_card",
    "render_card",
    "render_comparison",
    "write_card",
]
