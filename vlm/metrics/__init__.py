"""Measures of retrieval and question answering, in NumPy alone: numbers in, numbers out, no files."""

from vlm.metrics.answering import choice_accuracy, choice_chance
from vlm.metrics.bootstrap import (
    Interval,
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_ratio,
    paired_difference,
)
from vlm.metrics.retrieval import (
    Positives,
    RankCounts,
    chance_counts,
    check_finite,
    rank_candidates,
    rank_scores,
    top_candidates,
)
from vlm.metrics.twins import TwinScores, pair_positives, twin_scores

__all__ = [
    "Interval",
    "Positives",
    "RankCounts",
    "TwinScores",
    "bootstrap_class_mean",
    "bootstrap_mean",
    "bootstrap_median",
    "bootstrap_ratio",
    "chance_counts",
    "check_finite",
    "choice_accuracy",
    "choice_chance",
    "pair_positives",
    "paired_difference",
    "rank_candidates",
    "rank_scores",
    "top_candidates",
    "twin_scores",
]
