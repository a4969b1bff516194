"""Clips that differ in one respect: the reversed twin, minimal pairs and other casts, as hard negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np

from vlm.world.digits import images_of
from vlm.world.facts import KINDS_WITH_WAY, closure, facts, is_then, order_facts
from vlm.world.motion import BLINK_FRAMES, HOP_FRAMES
from vlm.world.scene import COLOURS, LAST, OPPOSITE, Event, Scene
from vlm.world.splits import BLOCK_OF, belongs, is_sound

SHORTEST = {"move": 8, "zigzag": 15, "circle": 16, "spin": 16, "swap": 12}


def twin(scene: Scene) -> Scene:
    """Return the reversed twin: the same frames, last one first."""
    return scene.backwards()


def has_twin(scene: Scene) -> bool:
    """Whether reversal makes the caption false both ways; never so for time-symmetric scenes."""
    return _differ(scene, scene.backwards())


def _differ(scene: Scene, other: Scene) -> bool:
    return not facts(scene) <= closure(other) and not facts(other) <= closure(scene)


def variants(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """Return scenes that differ in one thing, by what it is; caption and scene are false of one another.

    Kinds: ``digit``, ``binding`` (colours exchanged), ``actor`` (who does it), ``direction``, ``speed``,
    ``count``, ``concurrency`` ("while" against "then"), ``left-of``, ``stopping`` (stops or waits against
    goes on) and ``order``. Looks, places and wording stay. A kind is missing where the scene has nothing
    to change, or the change would leave the split.
    """
    found = {}
    for kind, change in _CHANGES.items():
        other = change(scene, rng)
        if other is None or not is_sound(other) or not belongs(other, scene.split):
            continue
        if _differ(scene, other):
            found[kind] = other
    return found


def recast(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Return the same motions done by others: every thing changes its colour, its digit or both.

    None if no such cast of the split was found in a few draws.
    """
    for _ in range(8):
        colours = [list(COLOURS)[place] for place in rng.permutation(len(COLOURS))]
        things = []
        for thing, colour in zip(scene.things, colours, strict=False):
            changes_colour, changes_digit = [(True, True), (True, False), (False, True)][int(rng.integers(3))]
            digit = (thing.digit + 1 + int(rng.integers(9))) % 10 if changes_digit else thing.digit
            choices = images_of(BLOCK_OF[scene.split], digit)
            image = choices[int(rng.integers(len(choices)))] if changes_digit else thing.image
            colour = colour if changes_colour else thing.colour
            things.append(replace(thing, colour=colour, digit=digit, image=image))
        other = replace(scene, things=tuple(things))
        if is_sound(other) and belongs(other, scene.split) and not _names(scene) & _names(other):
            return other if _differ(scene, other) else None
    return None


def _one(rng: np.random.Generator, places: list[int]) -> int | None:
    return places[int(rng.integers(len(places)))] if places else None


def _with_event(scene: Scene, place: int, event: Event) -> Scene:
    return replace(scene, events=(*scene.events[:place], event, *scene.events[place + 1 :]))


def _two_things(scene: Scene, rng: np.random.Generator) -> tuple[int, int] | None:
    pairs = list(combinations(range(len(scene.things)), 2))
    return pairs[int(rng.integers(len(pairs)))] if pairs else None


def _digit(scene: Scene, rng: np.random.Generator) -> Scene | None:
    place = int(rng.integers(len(scene.things)))
    thing = scene.things[place]
    digit = (thing.digit + 1 + int(rng.integers(9))) % 10
    choices = images_of(BLOCK_OF[scene.split], digit)
    changed = replace(thing, digit=digit, image=choices[int(rng.integers(len(choices)))])
    return replace(scene, things=(*scene.things[:place], changed, *scene.things[place + 1 :]))


def _exchange(scene: Scene, rng: np.random.Generator, fields: tuple[str, ...]) -> Scene | None:
    """Exchange the named fields between two things; everything else stays with its place."""
    pair = _two_things(scene, rng)
    if pair is None:
        return None
    things = list(scene.things)
    for one, other in (pair, pair[::-1]):
        source = scene.things[other]
        things[one] = replace(things[one], **{field: getattr(source, field) for field in fields})
    return replace(scene, things=tuple(things))


def _names(scene: Scene) -> set[tuple[str, int]]:
    return {(thing.colour, thing.digit) for thing in scene.things}


def _binding(scene: Scene, rng: np.random.Generator) -> Scene | None:
    other = _exchange(scene, rng, ("colour",))
    return (
        other if other is None or _names(other) != _names(scene) else None
    )  # equal digits: that is ``actor``


def _actor(scene: Scene, rng: np.random.Generator) -> Scene | None:
    return _exchange(scene, rng, ("colour", "digit", "image"))


def _left_of(scene: Scene, rng: np.random.Generator) -> Scene | None:
    pairs = [item for item in facts(scene) if item[0] == "left"]
    if not pairs:
        return None
    names = [(thing.colour, thing.digit) for thing in scene.things]
    one, other = names.index(pairs[0][1]), names.index(pairs[0][2])  # type: ignore[arg-type]
    things = list(scene.things)
    things[one] = replace(things[one], x=scene.things[other].x)
    things[other] = replace(things[other], x=scene.things[one].x)
    return replace(scene, things=tuple(things))


def _direction(scene: Scene, rng: np.random.Generator) -> Scene | None:
    place = _one(rng, [i for i, event in enumerate(scene.events) if event.direction])
    if place is None:
        return None
    event = scene.events[place]
    opposite = OPPOSITE[event.direction or ""]
    return _with_event(scene, place, replace(event, direction=opposite, dx=-event.dx, dy=-event.dy))


def _speed(scene: Scene, rng: np.random.Generator) -> Scene | None:
    place = _one(rng, [i for i, event in enumerate(scene.events) if event.speed])
    if place is None:
        return None
    event = scene.events[place]
    ratio, speed = (2.4, "quickly") if event.speed == "slowly" else (1 / 2.4, "slowly")
    changed = replace(event, speed=speed, dx=round(event.dx * ratio, 2), dy=round(event.dy * ratio, 2))
    return _with_event(scene, place, changed)


def _count(scene: Scene, rng: np.random.Generator) -> Scene | None:
    place = _one(rng, [i for i, event in enumerate(scene.events) if event.count])
    if place is None:
        return None
    event = scene.events[place]
    count = 1 + ((event.count or 1) + int(rng.integers(2))) % 3
    duration = HOP_FRAMES * count if event.kind == "bounce" else BLINK_FRAMES * count - 5
    earliest = max([1, *(o.end + 2 for o in scene.events if is_then(o, event))])
    latest = min([LAST - 1, *(o.start - 2 for o in scene.events if is_then(event, o))])
    if earliest + duration > latest:
        return None
    start = min(max(earliest, (event.start + event.end - duration) // 2), latest - duration)
    other = _with_event(scene, place, replace(event, count=count, start=start, end=start + duration))
    same_order = order_facts(scene, scene.timeline) == order_facts(other, other.timeline)
    return other if same_order else None


def _stopping(scene: Scene, rng: np.random.Generator) -> Scene | None:
    if len(scene.events) != 1 or scene.events[0].kind not in KINDS_WITH_WAY:
        return None
    event = scene.events[0]
    if event.start == 0 and event.end == LAST:
        middle = int(rng.integers(16, 23))
        start, end = ((0, middle), (LAST - middle, LAST))[int(rng.integers(2))]
    elif event.start == 0 or event.end == LAST:
        start, end = 0, LAST
    else:
        return None
    return replace(scene, events=(_timed(event, start, end),))


def _timed(event: Event, start: int, end: int) -> Event:
    """Return the event in other frames at the same speed."""
    ratio = (end - start) / (event.end - event.start)
    return replace(event, start=start, end=end, dx=round(event.dx * ratio, 2), dy=round(event.dy * ratio, 2))


def _pair_in_time(scene: Scene) -> tuple[Event, Event] | None:
    if len(scene.events) != 2:
        return None
    first, second = sorted(scene.events, key=lambda event: (event.start, event.end))
    return first, second


def _order(scene: Scene, rng: np.random.Generator) -> Scene | None:
    pair = _pair_in_time(scene)
    if pair is None or not is_then(*pair):
        return None
    first, second = pair
    begin = first.start
    moved = replace(second, start=begin, end=begin + second.end - second.start)
    after = moved.end + second.start - first.end
    return replace(scene, events=(moved, replace(first, start=after, end=after + first.end - first.start)))


def _concurrency(scene: Scene, rng: np.random.Generator) -> Scene | None:
    pair = _pair_in_time(scene)
    if pair is None or {pair[0].subject, pair[0].partner} & {pair[1].subject, pair[1].partner} - {None}:
        return None
    first, second = pair
    if is_then(first, second):
        long = max(first.end - first.start, second.end - second.start)
        start = min(first.start, LAST - 1 - long)
        return replace(scene, events=tuple(_centred(event, start, long) for event in pair))
    lengths = [_room_needed(event) for event in pair]
    spare = LAST - 3 - sum(lengths)
    if spare < 0:
        return None
    begin = 1 + int(rng.integers(spare + 1))
    gap = begin + lengths[0] + 1
    return replace(
        scene,
        events=(
            _timed(first, begin, begin + lengths[0]),
            _timed(second, gap, gap + lengths[1]),
        ),
    )


def _room_needed(event: Event) -> int:
    """Frames an event takes when it has to share the clip: elastic kinds shrink to at most 18."""
    length = event.end - event.start
    return length if event.count else max(SHORTEST[event.kind], min(length, 17))


def _centred(event: Event, start: int, span: int) -> Event:
    length = event.end - event.start
    return replace(event, start=start + (span - length) // 2, end=start + (span - length) // 2 + length)


_CHANGES: dict[str, Callable[[Scene, np.random.Generator], Scene | None]] = {
    "digit": _digit,
    "binding": _binding,
    "actor": _actor,
    "direction": _direction,
    "speed": _speed,
    "count": _count,
    "concurrency": _concurrency,
    "left-of": _left_of,
    "stopping": _stopping,
    "order": _order,
}
