"""How far partial knowledge gets: retrieval ceilings computed from scenes alone, to read a plateau by.

An oracle sees every clip perfectly but only some of its facts. It prefers clips of which the part of the
caption that it understands is true, among them those with as many things and events as the caption has,
and then guesses; recalls are expectations over that guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import comb

import numpy as np
import numpy.typing as npt

from vlm.world.facts import Fact, Facts, closure, facts, inclusion
from vlm.world.scene import Scene

Scores = npt.NDArray[np.int64]
Truth = npt.NDArray[np.bool_]


def _colours(items: Facts) -> Facts:
    return frozenset(("has", item[1][0]) for item in items if item[0] == "has")  # type: ignore[index]


def _digits(items: Facts) -> Facts:
    return frozenset(item for item in items if item[0] == "has")


def _static(items: Facts) -> Facts:
    return frozenset(item for item in items if item[0] in ("has", "left"))


def _motions(items: Facts) -> Facts:
    """Keep what happens, without to whom: a multiset, copies numbered."""
    loose = [
        (item[0], item[1][0], item[1][2], *item[2:])  # type: ignore[index]
        if item[0] != "do" or item[1][0] != "swap"  # type: ignore[index]
        else ("do", "swap")
        for item in items
        if item[0] in ("do", "sense", "speed", "count", "ends", "waits", "nonstop")
    ]
    return _numbered(loose)


def _present(items: Facts) -> Facts:
    return _colours(items) | _motions(items)


def _bound(items: Facts) -> Facts:
    return frozenset(_without_digits(item) for item in items if item[0] not in ("then", "while", "left"))


def _order(items: Facts) -> Facts:
    return frozenset(_without_digits(item) for item in items)


def _everything(items: Facts) -> Facts:
    return items


def _words(items: Facts) -> Facts:
    """Keep the bag of words, who and whom and when lost."""
    words: list[Fact] = []
    for item in items:
        if item[0] == "has":
            words += [(part,) for part in item[1]]  # type: ignore[attr-defined]
        elif item[0] == "do":
            words.append((item[1][0],))  # type: ignore[index]
        elif item[0] in ("sense", "speed", "count"):
            words.append((item[2],))
        else:
            words.append((item[0],))
    return _numbered(words)


def _without_digits(value: Fact) -> Fact:
    """Replace every (colour, digit) by (colour,), however deep."""
    if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int) and value[0] != "count":
        return (value[0],)
    return tuple(_without_digits(part) if isinstance(part, tuple) else part for part in value)


def _numbered(items: list[Fact]) -> Facts:
    counted = Counter(items)
    return frozenset((*item, copy) for item, many in counted.items() for copy in range(many))


# what an oracle understands, and whether it can count things, events
ORACLES: dict[str, tuple[Callable[[Facts], Facts], bool, bool]] = {
    "colours": (_colours, True, False),
    "motions": (_motions, False, True),
    "colours and motions, unbound": (_present, True, True),
    "digits": (_digits, True, False),
    "static": (_static, True, False),
    "bound pairs": (_bound, True, True),
    "order": (_order, True, True),
    "words": (_words, True, True),
    "all": (_everything, True, True),
}


def oracle_scores(name: str, scenes: Sequence[Scene]) -> Scores:
    """Return (n, n) scores, 0 to 2, that the named oracle gives caption i and clip j.

    Args:
        name: A key of ``ORACLES``, or ``frame set``: everything, except which way time runs.
        scenes: The clips; their captions are the queries.
    """
    if name == "frame set":
        ahead = oracle_scores("all", scenes)
        behind = _scores("all", scenes, [scene.backwards() for scene in scenes])
        return np.maximum(ahead, behind)
    return _scores(name, scenes, scenes)


def _scores(name: str, described: Sequence[Scene], scenes: Sequence[Scene]) -> Scores:
    understand, counts_things, counts_events = ORACLES[name]
    fits = inclusion(
        [understand(facts(scene)) for scene in described], [understand(closure(scene)) for scene in scenes]
    )
    same = np.ones_like(fits)
    if counts_things:
        same &= _equal([len(s.things) for s in described], [len(s.things) for s in scenes])
    if counts_events:
        same &= _equal([len(s.events) for s in described], [len(s.events) for s in scenes])
    scores: Scores = fits.astype(np.int64) * (1 + same)
    return scores


def _equal(one: list[int], other: list[int]) -> Truth:
    equal: Truth = np.array(one)[:, None] == np.array(other)[None, :]
    return equal


def expected_recall(scores: Scores, positives: Truth, k: int) -> float:
    """Return the mean chance of a positive among the first ``k``, ties in random order."""
    total = 0.0
    for row, right in zip(scores, positives, strict=True):
        left, missed = k, 1.0
        for level in np.unique(row)[::-1]:
            group = row == level
            size, good = int(group.sum()), int(right[group].sum())
            taken = min(left, size)
            missed *= comb(size - good, taken) / comb(size, taken)
            left -= taken
            if left == 0:
                break
        total += 1.0 - missed
    return total / len(scores)


def ceilings(scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Return for every oracle ``recall@1``, ``recall@5`` and, if twins are present, ``pair recall@1``.

    Positives are all clips of which the caption is true. In a twin gallery, where every clip is followed
    or preceded by its reversal, ``pair recall@1`` also accepts a positive's twin. ``own clip`` is the
    recall of the clip itself by ``all``: how specific the captions are.
    """
    truth = inclusion([facts(scene) for scene in scenes], [closure(scene) for scene in scenes])
    places = {scene.clip_id: place for place, scene in enumerate(scenes)}
    twins = [places.get(scene.backwards().clip_id, -1) for scene in scenes]
    table = {}
    for name in (*ORACLES, "frame set"):
        scores = oracle_scores(name, scenes)
        table[name] = {f"recall@{k}": expected_recall(scores, truth, k) for k in (1, 5)}
        if min(twins) >= 0:
            table[name]["pair recall@1"] = expected_recall(scores, truth | truth[:, twins], 1)
        if name == "all":
            own = np.eye(len(scenes), dtype=bool)
            table["own clip"] = {"recall@1": expected_recall(scores, own, 1)}
            if min(twins) >= 0:
                table["own clip"]["pair recall@1"] = expected_recall(scores, own | own[:, twins], 1)
    return table
