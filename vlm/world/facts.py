"""What is true of a scene, as sets of small tuples: truth of a caption is set inclusion, nothing else.

Within a scene colours differ and no thing does the same (kind, direction) twice, so a fact names its event
without ambiguity and a conjunction of pairwise facts is the whole meaning of a caption.

Facts: ``("has", thing)``, ``("still", thing)``, ``("do", deed)``, ``("sense", deed, direction)``,
``("speed", deed, word)``, ``("count", deed, n)``, ``("ends", deed)``, ``("waits", deed)``,
``("nonstop", deed)``, ``("then", deed, deed)``, ``("while", deed, deed)``, ``("left", thing, thing)`` with
``thing = (colour, digit)`` and ``deed = (kind, thing, direction or partner or None)``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from vlm.world.scene import LAST, SIDE, Event, Scene

Fact = tuple[object, ...]
Facts = frozenset[Fact]

SETTLED_FRAMES = 6  # a thing that rests this long at an end of the clip is said to have stopped, or waited
APART = 20.0  # "left of" needs at least this much between two centres
KINDS_WITH_WAY = ("move", "zigzag")


def thing_name(scene: Scene, index: int) -> tuple[str, int]:
    """Return what identifies a thing in captions: (colour, digit)."""
    thing = scene.things[index]
    return (thing.colour, thing.digit)


def deed(scene: Scene, event: Event) -> Fact:
    """Return the name of an event that is unique within its scene."""
    subject = thing_name(scene, event.subject)
    if event.kind == "swap" and event.partner is not None:
        first, second = sorted((subject, thing_name(scene, event.partner)))
        return ("swap", first, second)
    return (event.kind, subject, event.direction if event.kind in KINDS_WITH_WAY else None)


def still_things(scene: Scene) -> list[int]:
    """Return the indices of the things to which nothing happens."""
    busy = {event.subject for event in scene.events} | {event.partner for event in scene.events}
    return [index for index in range(len(scene.things)) if index not in busy]


def left_pairs(scene: Scene) -> list[tuple[int, int]]:
    """Return (a, b) where a is clearly left of b in every frame, both never moving sideways."""
    sideways = set()
    for event in scene.events:
        if event.kind in ("circle", "zigzag", "swap") or event.dx != 0.0:
            sideways |= {event.subject, event.partner}
    fixed = [index for index in range(len(scene.things)) if index not in sideways]
    pairs = []
    for first, second in combinations(fixed, 2):
        gap = scene.things[second].x - scene.things[first].x
        if abs(gap) >= APART:
            pairs.append((first, second) if gap > 0 else (second, first))
    return [pair for pair in pairs if all(_inside(scene, index) for index in pair)]


def _inside(scene: Scene, index: int) -> bool:
    thing = scene.things[index]
    return thing.size / 2 <= thing.x <= SIDE - thing.size / 2


def is_then(first: Event, second: Event) -> bool:
    """Whether ``first`` is over when ``second`` begins."""
    return first.end <= second.start


def is_while(first: Event, second: Event) -> bool:
    """Whether two events share at least half of the shorter one's time."""
    shared = min(first.end, second.end) - max(first.start, second.start)
    return 2 * shared >= min(first.end - first.start, second.end - second.start)


def bearing(event: Event) -> str | None:
    """Return how a movement sits in the clip: ``nonstop``, ``ends``, ``waits``, or None for the middle."""
    early, late = event.start < SETTLED_FRAMES, event.end > LAST - SETTLED_FRAMES
    if event.start == 0 and event.end == LAST:
        return "nonstop"
    if event.start == 0 and not late:
        return "ends"
    if event.end == LAST and not early:
        return "waits"
    return None


def event_facts(scene: Scene, event: Event) -> set[Fact]:
    """Return everything that is true of one event by itself."""
    name = deed(scene, event)
    found: set[Fact] = {("do", name)}
    if event.direction is not None:
        found.add(("sense", name, event.direction))
    if event.speed is not None:
        found.add(("speed", name, event.speed))
    if event.count is not None:
        found.add(("count", name, event.count))
    if event.kind in KINDS_WITH_WAY:
        if event.end <= LAST - SETTLED_FRAMES:
            found.add(("ends", name))
        if event.start >= SETTLED_FRAMES:
            found.add(("waits", name))
        if event.start == 0 and event.end == LAST:
            found.add(("nonstop", name))
    return found


def order_facts(scene: Scene, timeline: Sequence[Event]) -> set[Fact]:
    """Return which events come after one another and which happen at the same time."""
    found: set[Fact] = set()
    for first, second in combinations(timeline, 2):
        one, other = deed(scene, first), deed(scene, second)
        if is_then(first, second):
            found.add(("then", one, other))
        elif is_then(second, first):
            found.add(("then", other, one))
        elif is_while(first, second):
            found |= {("while", one, other), ("while", other, one)}
    return found


def content(scene: Scene) -> Facts:
    """Return all that is true of the scene's things and events, without places; the scene key hashes it."""
    found: set[Fact] = {("has", thing_name(scene, index)) for index in range(len(scene.things))}
    found |= {("still", thing_name(scene, index)) for index in still_things(scene)}
    timeline = scene.timeline
    for event in timeline:
        found |= event_facts(scene, event)
    return frozenset(found | order_facts(scene, timeline))


def closure(scene: Scene) -> Facts:
    """Return every fact that a caption could state and that is true of the scene."""
    places: set[Fact] = {
        ("left", thing_name(scene, first), thing_name(scene, second)) for first, second in left_pairs(scene)
    }
    return content(scene) | places


def mentions(scene: Scene, what: int) -> float:
    """Return a fixed number in [0, 1) that decides whether the caption mentions detail ``what``.

    It hangs on the wording seed alone, so a twin or a minimal pair is described in the same detail.
    """
    mixed = (scene.wording_seed * 0x9E3779B97F4A7C15 + what * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 31
    mixed = (mixed * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return float((mixed >> 11) / (1 << 53))


def mentions_speed(scene: Scene, event: Event) -> bool:
    """Whether the caption says how fast; always when there is only one event."""
    return event.speed is not None and (len(scene.events) == 1 or mentions(scene, 10 + event.subject) < 0.8)


def mentions_sense(scene: Scene, event: Event) -> bool:
    """Whether the caption names the sense of a circle; a spin's and a way's direction are always named."""
    return event.direction is not None and (event.kind != "circle" or mentions(scene, 20) < 0.8)


def mentioned_places(scene: Scene) -> list[tuple[int, int]]:
    """Return the "left of" pair the caption states: at most one, and only in captions that stay short."""
    pairs = left_pairs(scene)
    short = len(scene.events) + len(still_things(scene)) <= 2
    return pairs[:1] if short and mentions(scene, 30) < 0.6 else []


def facts(scene: Scene) -> Facts:
    """Return what the scene's caption states; every one of its wordings says exactly this."""
    found: set[Fact] = {("has", thing_name(scene, index)) for index in range(len(scene.things))}
    found |= {("still", thing_name(scene, index)) for index in still_things(scene)}
    timeline = scene.timeline
    for event in timeline:
        name = deed(scene, event)
        found.add(("do", name))
        if mentions_sense(scene, event):
            found.add(("sense", name, event.direction))
        if mentions_speed(scene, event):
            found.add(("speed", name, event.speed))
        if event.count is not None:
            found.add(("count", name, event.count))
        if len(scene.events) == 1 and event.kind in KINDS_WITH_WAY and bearing(event):
            found.add((str(bearing(event)), name))
    found |= {
        ("left", thing_name(scene, first), thing_name(scene, second))
        for first, second in mentioned_places(scene)
    }
    return frozenset(found | order_facts(scene, timeline))


def is_true(claims: Facts, scene: Scene) -> bool:
    """Whether a caption that states ``claims`` is true of ``scene``."""
    return claims <= closure(scene)


def truth_matrix(described: Sequence[Scene], scenes: Sequence[Scene]) -> npt.NDArray[np.bool_]:
    """Return (n, m) bool: whether the caption of ``described[i]`` is true of ``scenes[j]``."""
    return inclusion([facts(scene) for scene in described], [closure(scene) for scene in scenes])


def inclusion(claims: Sequence[Facts], truths: Sequence[Facts]) -> npt.NDArray[np.bool_]:
    """Return (n, m) bool: ``claims[i] <= truths[j]``, a Bloom filter sparing most comparisons."""
    asked = np.array([_bloom(item) for item in claims], dtype=np.uint64).reshape(-1, 1)
    given = np.array([_bloom(item) for item in truths], dtype=np.uint64).reshape(1, -1)
    result: npt.NDArray[np.bool_] = (asked & ~given) == 0
    for row, column in np.argwhere(result):
        result[row, column] = claims[row] <= truths[column]
    return result


def _bloom(items: Facts) -> int:
    bits = 0
    for item in items:
        if item[0] in ("has", "do"):
            bits |= 1 << (zlib.crc32(repr(item).encode()) & 63)
    return bits


# what a clip of a single event, or of a single thing, can be sorted by: name of the choice -> its classes
ACTIONS: dict[str, tuple[str, ...]] = {
    "direction": ("left", "right", "up", "down"),
    "action": (
        "move left", "move right", "move up", "move down", "zigzag left", "zigzag right", "circle clockwise",
        "circle counterclockwise", "spin clockwise", "spin counterclockwise", "bounce", "blink", "swap",
    ),
    "digit": tuple("0123456789"),
}  # fmt: skip


def action(scene: Scene, choice: str) -> str | None:
    """Return the class of what happens, or of who is there; None unless that is one thing which has a class.

    Args:
        scene: A clip, forwards or backwards.
        choice: ``direction`` sorts movements by where they go, ``action`` single events by what happens,
            ``digit`` clips of a single thing by what it is.

    Raises:
        ValueError: There is no such choice.
    """
    if choice not in ACTIONS:
        raise ValueError(f"choice must be one of {', '.join(ACTIONS)}, got {choice!r}")
    if choice == "digit":
        return str(scene.things[0].digit) if len(scene.things) == 1 else None
    if len(scene.events) != 1:
        return None
    (event,) = scene.timeline
    if choice == "direction":
        return event.direction if event.kind in KINDS_WITH_WAY else None
    return event.kind if event.direction is None else f"{event.kind} {event.direction}"
