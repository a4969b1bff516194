"""From the scores of a video's stretches to moments and to the saliency of its clips."""

from __future__ import annotations

import numpy as np

from vlm.evaluation.moments.settings import Proposals
from vlm.metrics import overlaps
from vlm.metrics.matrices import Floats
from vlm.retrieval.segments import cut_segments


def cut_stretches(duration_s: float, proposals: Proposals) -> list[tuple[float, float]]:
    """Return the stretches of every length that cover a video, each once, by start and then by end.

    Raises:
        ValueError: The duration is not a positive number of seconds.
    """
    found = {
        stretch
        for length in proposals.segment_s
        for stretch in cut_segments(duration_s, length, length * proposals.stride)
    }
    return sorted(found)


def propose(stretches: Floats, scores: Floats, max_windows: int, suppress_iou: float) -> Floats:
    """Return the best stretches of which no two overlap by more than ``suppress_iou``, best first.

    Among equal scores the one that stands first wins.

    Args:
        stretches: (n, 2) start and end, in seconds.
        scores: (n,) of one query.
        max_windows: How many at most.
        suppress_iou: The largest overlap with a better one; 1 keeps all.

    Returns:
        (windows, 3) start, end and score.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order) and len(kept) < max_windows:
        best = int(order[0])
        kept.append(best)
        rest = order[1:]
        order = rest[overlaps(stretches[best : best + 1], stretches[rest])[0] <= suppress_iou]
    return np.column_stack([stretches[kept], scores[kept].astype(np.float64)])


def rate_clips(stretches: Floats, scores: Floats, num_clips: int, clip_s: float) -> Floats:
    """Return for each clip of ``clip_s`` seconds the mean score of the stretches around its middle, (clips,).

    A clip beyond the end has the score of the last moment of the video.
    """
    last = float(np.nextafter(stretches[:, 1].max(), 0))
    middles = np.minimum((np.arange(num_clips) + 0.5) * clip_s, last)[:, None]
    covers = (stretches[:, 0] <= middles) & (middles < stretches[:, 1])
    means: Floats = (covers * scores).sum(axis=1) / covers.sum(axis=1)
    return means
