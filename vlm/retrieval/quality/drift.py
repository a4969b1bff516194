"""Alarms: what became worse or moved between two runs of a check, beyond what chance explains.

Recall, scores and strength are compared item by item. An alarm needs the 95 % interval of the difference,
resampled by video, on one side of zero, and the exact sign test over videos at 2.5 %: where runs differ by
chance only, each comparison alarms at most 2.5 times in a hundred per side, however few the videos (six that
all fell are the fewest that alarm), and all that look for a fall (three of recall, one of scores, one of
strength) together at most 12.5 times. The alarms of the bank and of videos that left compare what is equal
while nothing changes, and have no false ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vlm.metrics import paired_difference
from vlm.retrieval.quality.check import RECALL_AT, groups_of, key_of, within

# backends, devices and batch sizes round otherwise in the third digit after the point, not before
_ROUNDING = 2e-3
_CHANCE = 0.025
_Pair = tuple[dict[str, Any], dict[str, Any]]


def find_drift(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the alarms of a run, given the one before; JSON-ready, none if nothing drifted.

    Returns:
        ``alarm`` (recall, scores, strong, bank, left), ``what`` for people, and what it rests on: a
        difference (``value``, ``low``, ``high``) or ``items``. Scores, strong and bank need runs of one model
        searched in one way, and what runs of earlier versions did not note; the bank also an unchanged index.
    """
    alarms: list[dict[str, Any]] = []
    earlier = {key_of(outcome): outcome for outcome in before["outcomes"]}
    pairs = [(earlier[key_of(after)], after) for after in now["outcomes"] if key_of(after) in earlier]
    for k in RECALL_AT if pairs else ():
        then, after = (within([pair[side] for pair in pairs], k) for side in (0, 1))
        interval, way = _difference(then, after, pairs)
        if way < 0:
            alarms.append({"alarm": "recall", "what": f"recall@{k} fell", **interval})
    if all(before.get(name) == now.get(name) for name in ("model_fingerprint", "rerank")):
        alarms += _moved(pairs) + _bank(before, now)
    left = [item for item in now["missing"] if key_of(item) in earlier]
    if left:
        videos = len({item["video"] for item in left})
        what = f"{videos} of the videos that queries name left the index"
        alarms.append({"alarm": "left", "what": what, "items": left})
    return alarms


def _moved(pairs: list[_Pair]) -> list[dict[str, Any]]:
    """Return the alarms of scores and strength, over items that were found, or graded, both times."""
    alarms: list[dict[str, Any]] = []
    found = [pair for pair in pairs if all(one.get("score") is not None for one in pair)]
    if found:
        interval, way = _difference(
            [then["score"] for then, _ in found], [now["score"] for _, now in found], found
        )
        if way and abs(interval["value"]) > _ROUNDING:
            what = f"scores of known items {'fell' if way < 0 else 'rose'}"
            alarms.append({"alarm": "scores", "what": what, **interval})
    graded = [pair for pair in pairs if all(one.get("strength") is not None for one in pair)]
    if graded:
        then, now = ([float(pair[side]["strength"] == "strong") for pair in graded] for side in (0, 1))
        interval, way = _difference(then, now, graded)
        if way < 0:
            alarms.append({"alarm": "strong", "what": "fewer best hits are strong", **interval})
    return alarms


def _bank(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    then, after = (np.array(run.get("bank_scores") or [], np.float64) for run in (before, now))
    is_same = all(before.get(name) == now.get(name) for name in ("index", "generation"))
    if not is_same or len(then) != len(after) or not len(then):
        return []
    moved = after - then
    if float(np.abs(moved).max()) <= _ROUNDING:
        return []
    what = "unrelated texts score otherwise though the index is unchanged: the model is not what it was"
    value, low, high = (float(number) for number in (np.median(moved), moved.min(), moved.max()))
    return [{"alarm": "bank", "what": what, "value": value, "low": low, "high": high}]


def _difference(then: list[float], now: list[float], pairs: list[_Pair]) -> tuple[dict[str, float], int]:
    """Return the difference with its interval, and -1, 0 or 1: whether it fell or rose beyond chance."""
    groups = groups_of([pair[1] for pair in pairs])
    interval = paired_difference(then, now, groups)
    signs = np.sign(np.bincount(groups, weights=np.subtract(now, then)))
    fallen, risen = int((signs < 0).sum()), int((signs > 0).sum())
    if interval.high < 0 and _chance(fallen, fallen + risen) <= _CHANCE:
        return interval._asdict(), -1
    if interval.low > 0 and _chance(risen, fallen + risen) <= _CHANCE:
        return interval._asdict(), 1
    return interval._asdict(), 0


def _chance(count: int, total: int) -> float:
    """Return how often at least `count` of `total` fair coins fall on one given side."""
    return float(sum(math.comb(total, number) for number in range(count, total + 1)) / 2**total)
