"""Which scenes belong to which split: held-out combinations, and buckets of the scene key."""

from __future__ import annotations

import hashlib
from itertools import combinations

from vlm.world.captions import MAX_WORDS, longest_caption
from vlm.world.facts import KINDS_WITH_WAY, Facts, content, is_then, still_things
from vlm.world.scene import COLOURS, LAST, OPPOSITE, SPIN_DIGITS, Event, Scene

# the place in this list is a part of every stream's key: new ones go to the end
SPLITS = ("train", "val", "test", "combo", "ood", "long")
BLOCK_OF = {"train": "train", "val": "val", "test": "test", "combo": "test", "ood": "test", "long": "test"}
HELD_MOTIONS = frozenset({("zigzag", "up"), ("zigzag", "down")})
_TEST = range(80, 100)
_BUCKETS = {"train": range(0, 70), "val": range(70, 80), "test": _TEST, "ood": _TEST, "long": _TEST}


def digest(text: str, modulus: int) -> int:
    """Return a stable hash of ``text`` below ``modulus``, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % modulus


def scene_key(scene: Scene) -> str:
    """Return 16 hex digits that name what happens (things, events, order), not where or how it looks."""
    return _key(content(scene))


def _key(items: Facts) -> str:
    text = "\n".join(sorted(map(repr, items)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def bucket(scene: Scene) -> int:
    """Return the scene key's bucket, 0 to 99; a scene and its twin always share it."""
    return digest(min(scene_key(scene), scene_key(scene.backwards())), 100)


def is_held_pair(digit: int, colour: str) -> bool:
    """Whether this digit never has this colour outside ``combo``."""
    return list(COLOURS).index(colour) == (3 * digit + 2) % len(COLOURS)


def is_held_order(first: tuple[str, str | None], second: tuple[str, str | None]) -> bool:
    """Whether this kind of event never precedes that one outside ``combo``; reversal keeps the answer."""
    backwards = tuple((kind, OPPOSITE[way] if way else None) for kind, way in (second, first))
    return digest("order " + min(repr((first, second)), repr(backwards)), 8) == 0


def held_combinations(scene: Scene) -> tuple[str, ...]:
    """Return which kinds of held-out combination the scene contains."""
    found = []
    if any(is_held_pair(thing.digit, thing.colour) for thing in scene.things):
        found.append("digit-colour")
    if any((event.kind, event.direction) in HELD_MOTIONS for event in scene.events):
        found.append("kind-direction")
    if any(
        is_held_order((first.kind, first.direction), (second.kind, second.direction))
        for first, second in combinations(scene.timeline, 2)
        if is_then(first, second)
    ):
        found.append("event-order")
    return tuple(found)


def belongs(scene: Scene, split: str) -> bool:
    """Whether the scene's content may appear in ``split``."""
    held = held_combinations(scene)
    return bool(held) if split == "combo" else not held and bucket(scene) in _BUCKETS[split]


def is_sound(scene: Scene) -> bool:
    """Whether the scene keeps the rules that make its captions exact."""
    things = scene.things
    if len({thing.colour for thing in things}) < len(things):
        return False
    swaps = [event for event in scene.events if event.kind == "swap"]
    swapped = {thing for event in swaps for thing in (event.subject, event.partner)}
    if len(swaps) > 1 or any(e.kind in KINDS_WITH_WAY and e.subject in swapped for e in scene.events):
        return False  # a way before a swap would show in the distance between the two
    if len({_signature(event) for event in scene.events}) < len(scene.events):
        return False
    if any(e.kind == "spin" and things[e.subject].digit not in SPIN_DIGITS for e in scene.events):
        return False
    for first, second in combinations(scene.events, 2):
        together = not is_then(first, second) and not is_then(second, first)
        if together and {first.subject, first.partner} & {second.subject, second.partner} - {None}:
            return False
    timely = all(0 <= e.start < e.end <= LAST for e in scene.events)
    clauses = len(scene.events) + len(still_things(scene))
    return timely and (clauses < 4 or longest_caption(scene) <= MAX_WORDS)


def _signature(event: Event) -> tuple[object, ...]:
    return (event.kind, event.subject, event.direction if event.kind in KINDS_WITH_WAY else None)
