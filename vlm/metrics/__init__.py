"""Measures of retrieval, moments and answers, in NumPy alone: numbers in, numbers out, no files."""

from vlm.metrics.answering import (
    answer_coverage,
    choice_accuracy,
    choice_chance,
    exact_match,
    normalise_answer,
)
from vlm.metrics.bootstrap import (
    Interval,
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_median,
    bootstrap_ratio,
    paired_difference,
)
from vlm.metrics.calibration import Reliability, RiskCoverage, calibrated_error, reliability, risk_coverage
from vlm.metrics.inspection import (
    FirstItems,
    ScoreHistogram,
    first_items,
    occurrences,
    score_histogram,
    skewness,
)
from vlm.metrics.matrices import check_finite
from vlm.metrics.moments import highlight_measures, moment_measures, overlaps
from vlm.metrics.normalisation import bank_softmax, dual_softmax
from vlm.metrics.positives import Positives, demand_share, merge_duplicates, strict_ceiling
from vlm.metrics.retrieval import (
    Adjustment,
    RankCounts,
    chance_counts,
    rank_candidates,
    rank_scores,
    top_candidates,
)
from vlm.metrics.twins import TwinScores, pair_positives, twin_scores

__all__ = [
    "Adjustment",
    "FirstItems",
    "Interval",
    "Positives",
    "RankCounts",
    "Reliability",
    "RiskCoverage",
    "ScoreHistogram",
    "TwinScores",
    "answer_coverage",
    "bank_softmax",
    "bootstrap_class_mean",
    "bootstrap_mean",
    "bootstrap_means",
    "bootstrap_median",
    "bootstrap_ratio",
    "calibrated_error",
    "chance_counts",
    "check_finite",
    "choice_accuracy",
    "choice_chance",
    "demand_share",
    "dual_softmax",
    "exact_match",
    "first_items",
    "highlight_measures",
    "merge_duplicates",
    "moment_measures",
    "normalise_answer",
    "occurrences",
    "overlaps",
    "pair_positives",
    "paired_difference",
    "rank_candidates",
    "rank_scores",
    "reliability",
    "risk_coverage",
    "score_histogram",
    "skewness",
    "strict_ceiling",
    "top_candidates",
    "twin_scores",
]
