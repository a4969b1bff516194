"""Accuracy of classifiers: views of a video averaged, hits among the best, means over classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vlm.metrics.matrices import Floats, Ints


def average_views(logits: ArrayLike) -> Floats:
    """Return the mean over a video's views of the softmax of its logits: (videos, classes) float64.

    Args:
        logits: (videos, views, classes), finite.

    Raises:
        ValueError: The shape is another, or a logit is not finite.
    """
    values = np.asarray(logits, np.float64)
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"expected logits of shape (videos, views, classes), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("logits are not finite")
    powers = np.exp(values - values.max(axis=2, keepdims=True))
    means: Floats = (powers / powers.sum(axis=2, keepdims=True)).mean(axis=1)
    return means


def top_hits(scores: ArrayLike, labels: ArrayLike, k: int) -> Floats:
    """Return the probability that each video's class is among its k best, ties broken at random; (videos,).

    Args:
        scores: (videos, classes), finite; more is better.
        labels: (videos,) numbers of the right classes.
        k: 1 to the number of classes.

    Raises:
        ValueError: Shapes do not fit, a label or k is out of range, or a score is not finite.
    """
    values, right = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
    if values.ndim != 2 or right.shape != values.shape[:1] or not len(right):
        raise ValueError(
            f"expected scores (videos, classes) and a label each, got {values.shape}, {right.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("scores are not finite")
    if right.min() < 0 or right.max() >= values.shape[1] or not 1 <= k <= values.shape[1]:
        raise ValueError(
            f"expected labels in 0..{values.shape[1] - 1} and k in 1..{values.shape[1]}, got labels in "
            f"{right.min()}..{right.max()} and k = {k}"
        )
    own = values[np.arange(len(values)), right][:, None]
    above, tied = (values > own).sum(axis=1), (values == own).sum(axis=1)
    chances: Floats = np.clip((k - above) / tied, 0.0, 1.0)
    return chances


def class_accuracy(hits: ArrayLike, labels: ArrayLike) -> Floats:
    """Return the mean of ``hits`` over the videos of each class that occurs, by ascending number.

    Raises:
        ValueError: The lengths differ or there is no video.
    """
    values, classes = np.asarray(hits, np.float64), np.asarray(labels, np.int64)
    if values.shape != classes.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"expected a hit and a label a video, got {values.shape} and {classes.shape}")
    present, place = np.unique(classes, return_inverse=True)
    means: Floats = np.bincount(place, weights=values) / np.bincount(place, minlength=len(present))
    return means


def confusion(predicted: ArrayLike, labels: ArrayLike, num_classes: int) -> Ints:
    """Return how many videos of each class (row) were given each class (column), (classes, classes)."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
