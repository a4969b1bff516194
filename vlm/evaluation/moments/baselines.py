"""What is found without looking at a video: figures that hide how little is understood stand beside these.

Source: Otani et al. 2020, Uncovering Hidden Challenges in Query-Based Video Moment Retrieval: guessing from
where windows usually lie reaches most of what was published on Charades-STA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm.evaluation.moments.data import MomentSet
from vlm.evaluation.moments.measures import (
    measure_highlights,
    measure_windows,
    rated_queries,
    with_intervals,
)
from vlm.evaluation.protocol import Protocol
from vlm.metrics.matrices import Floats

_TRIALS = 5
_Draw = Callable[[np.random.Generator, int], Floats]


def blind_moments(data: MomentSet, protocol: Protocol) -> dict[str, Any]:
    """Return the measures of three guesses, each with its interval; empty if a video's length is not known.

    ``whole video``: its only window is all of it. ``random window``: both ends drawn at random, mean over
    trials. ``window of another video``: the place, relative to the length, of a true window of some other
    video, drawn at random, mean over trials; it knows where people find something, and sees nothing.
    """
    assert protocol.moments is not None
    if any(duration is None for duration in data.durations_s):
        return {}
    durations = np.asarray([data.durations_s[video] for video in data.query_video], np.float64)
    count = protocol.moments.max_windows
    whole = [np.asarray([[0.0, duration, 1.0]]) for duration in durations]
    named = {"whole video": measure_windows(whole, data, protocol)}
    draws: dict[str, _Draw] = {"random window": lambda random, _: np.sort(random.random((count, 2)), axis=1)}
    if len(data.video_ids) > 1:
        draws["window of another video"] = _other_windows(data, durations, count)
    for name, draw in draws.items():
        random = np.random.default_rng(protocol.bootstrap.seed)
        trials = [measure_windows(_place(draw, random, durations), data, protocol) for _ in range(_TRIALS)]
        named[name] = {key: np.mean([trial[key] for trial in trials], axis=0) for key in trials[0]}
    return {
        name: with_intervals(values, data.query_video, protocol.bootstrap) for name, values in named.items()
    }


def blind_highlights(data: MomentSet, protocol: Protocol) -> dict[str, Any]:
    """Return the measures of scores that are the same for every clip; empty where nobody rated clips."""
    rated = rated_queries(data)
    if not rated:
        return {}
    tables = [data.ratings[query] for query in rated]
    alike = [np.zeros(len(table)) for table in tables if table is not None]
    groups = data.query_video[rated]
    named: Mapping[str, Mapping[str, Floats]] = measure_highlights(alike, data)
    return {
        "every clip alike": {
            name: with_intervals(values, groups, protocol.bootstrap) for name, values in named.items()
        }
    }


def _place(draw: _Draw, random: np.random.Generator, durations: Floats) -> list[Floats]:
    placed = []
    for query, duration in enumerate(durations.tolist()):
        ends = draw(random, query) * duration
        placed.append(np.column_stack([ends, np.zeros(len(ends))]))
    return placed


def _other_windows(data: MomentSet, durations: Floats, count: int) -> _Draw:
    owners = np.repeat(data.query_video, [len(truth) for truth in data.truths])
    relative = np.concatenate(
        [np.clip(truth / duration, 0, 1) for truth, duration in zip(data.truths, durations, strict=True)]
    )
    order = np.argsort(owners, kind="stable")
    owners, relative = owners[order], relative[order]

    def draw(random: np.random.Generator, query: int) -> Floats:
        # the windows of the query's own video stand together, and drawing steps over them
        first, last = np.searchsorted(owners, data.query_video[query] + np.array([0, 1]))
        drawn = random.integers(len(owners) - (last - first), size=count)
        return np.asarray(relative[np.where(drawn < first, drawn, drawn + (last - first))])

    return draw
