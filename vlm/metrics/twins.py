"""A gallery of clips and their time-reversed twins: is it the right clip, and the right direction?

A twin shows the same frames in the opposite order, so whoever ignores order cannot tell it from the clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.metrics.matrices import Floats, Ints, check_finite, promote
from vlm.metrics.positives import Positives


@dataclass(frozen=True, slots=True)
class TwinScores:
    """Outcomes by pair of clips, as probabilities under random tie order; all are (pairs,).

    Attributes:
        text: Each of the two clips scores its own caption above its twin's; chance 1/4.
        video: Each of the two captions scores its own clip above the twin; chance 1/4.
        group: Both at once; chance 1/6.
        direction: A caption, shown its clip and the twin alone, takes its clip: mean of the two; chance 1/2.
    """

    text: Floats
    video: Floats
    group: Floats
    direction: Floats


def pair_positives(positives: Positives, twin_of: Ints) -> Positives:
    """Return the positives together with their twins: "the right pair, whatever its direction".

    Args:
        positives: The right items of each query.
        twin_of: The twin's column of each item, or -1 for an item without one; (items,).
    """
    lists = []
    for query in range(len(positives)):
        own = positives[query]
        twins = twin_of[own]
        lists.append(np.union1d(own, twins[twins >= 0]).tolist())
    return Positives.from_lists(lists, positives.num_items)


def twin_scores(scores: NDArray[Any]) -> TwinScores:
    """Score pairs of clips against their two captions.

    Args:
        scores: (pairs, 2, 2): ``scores[p, i, j]`` is caption i of pair p against clip j, each caption's own
            clip on the diagonal.

    Raises:
        ValueError: The shape is wrong or a score is not finite.

    Source: Thrush et al. 2022, Winoground, section 3 (text, image and group score).
    """
    if scores.ndim != 3 or scores.shape[1:] != (2, 2):
        raise ValueError(f"expected scores (pairs, 2 captions, 2 clips), got {scores.shape}")
    check_finite(scores)
    scores = promote(scores)
    first, second = scores[:, 0, 0], scores[:, 1, 1]
    other_clip, other_text = scores[:, 0, 1], scores[:, 1, 0]
    by_text = _beats(first, other_text), _beats(second, other_clip)
    by_clip = _beats(first, other_clip), _beats(second, other_text)
    return TwinScores(
        text=by_text[0] * by_text[1],
        video=by_clip[0] * by_clip[1],
        group=_both_beat_both(np.stack([first, second], axis=1), np.stack([other_clip, other_text], axis=1)),
        direction=(by_clip[0] + by_clip[1]) / 2,
    )


def _beats(left: Floats, right: Floats) -> Floats:
    return np.asarray((left > right) + 0.5 * (left == right))


def _both_beat_both(own: Floats, other: Floats) -> Floats:
    """Return the chance that both of ``own`` (pairs, 2) precede both of ``other`` in a random tie order."""
    lowest, highest = own.min(axis=1), other.max(axis=1)
    at_cut = (own == lowest[:, None]).sum(axis=1), (other == highest[:, None]).sum(axis=1)
    # a own and b other values tie at the cut: one order in C(a + b, a) has all of a first
    orders = np.array([[1, 1, 1], [1, 2, 3], [1, 3, 6]])[at_cut]
    return np.asarray((lowest > highest) + (lowest == highest) / orders)
