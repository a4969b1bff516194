"""Questions with options, answers known from the scene and balanced per question template."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vlm.world.captions import (
    ARTICLES,
    COUNTS,
    SENSES,
    SPEEDS,
    THEN,
    VERBS,
    WHILE,
    Template,
    event_words,
    left_words,
    thing_words,
)
from vlm.world.facts import KINDS_WITH_WAY, is_then, left_pairs, still_things
from vlm.world.scene import COLOURS, DIRECTIONS, SPIN_DIGITS, Event, Scene
from vlm.world.splits import HELD_MOTIONS, is_held_order, is_held_pair

_PLAIN = Template(0, 0, 0, 0, 0)
_INFINITIVES = {
    "move": "move",
    "zigzag": "zigzag",
    "circle": "circle",
    "spin": "spin",
    "bounce": "bounce",
} | {"blink": "blink"}
_NUM_OPTIONS = 4
QUESTION_WORDS = (
    "which way does how often fast what colour is digit happens first last yes no",
    *_INFINITIVES.values(),
)


class Question(NamedTuple):
    """A multiple-choice question about a clip.

    Attributes:
        text: The question.
        options: Two to four answers; their order is random.
        statements: Each option as a full sentence in the language of captions, for the matching head.
        answer_index: Which option is right.
        kind: What is asked for; answers are balanced within each kind.
    """

    text: str
    options: tuple[str, ...]
    statements: tuple[str, ...]
    answer_index: int
    kind: str

    @property
    def answer(self) -> str:
        """The right option."""
        return self.options[self.answer_index]


def questions(scene: Scene) -> list[Question]:
    """Return every question that has one exact answer in the scene, always in the same order."""
    rng = np.random.Generator(np.random.Philox(key=scene.wording_seed))
    found = _about_events(scene, rng) + _about_things(scene, rng) + _about_order(scene, rng)
    return found + _about_places(scene, rng)


def _ask(
    rng: np.random.Generator, kind: str, text: str, pairs: list[tuple[str, str]], correct: int = 0
) -> Question:
    """Shuffle (option, statement) pairs; ``correct`` is the right one's place before."""
    order = [int(place) for place in rng.permutation(len(pairs))]
    return Question(
        text=text,
        options=tuple(pairs[place][0] for place in order),
        statements=tuple(" ".join(pairs[place][1].split()) for place in order),
        answer_index=order.index(correct),
        kind=kind,
    )


def _about_events(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    alone = len({(event.kind, event.subject) for event in scene.events}) == len(scene.events)
    one_slot = not any(is_then(a, b) or is_then(b, a) for a in scene.events for b in scene.events if a != b)
    for event in scene.timeline:
        if not alone or event.kind == "swap":
            continue
        who, does = thing_words(scene, event.subject, _PLAIN), VERBS[0][event.kind]
        doing = f"does {who} {_INFINITIVES[event.kind]}"
        if event.direction is not None:
            ways = _ways(event)
            pairs = [(way, f"{who} {does} {way}") for way in ways]
            asked = f"which way {doing}"
            found.append(_ask(rng, f"direction-{event.kind}", asked, pairs, ways.index(event.direction)))
        if event.speed is not None:
            pairs = [(speed, f"{who} {does} {event.direction} {speed}") for speed in SPEEDS]
            found.append(_ask(rng, "speed", f"how fast {doing}", pairs, SPEEDS.index(event.speed)))
        if event.count is not None and one_slot:  # with less room in time, high counts would be rare
            pairs = [(count, f"{who} {does} {count}") for count in COUNTS]
            found.append(_ask(rng, f"count-{event.kind}", f"how often {doing}", pairs, event.count - 1))
    return found


def _ways(event: Event) -> list[str]:
    if event.kind not in KINDS_WITH_WAY:
        return list(SENSES)
    held = (event.kind, event.direction) in HELD_MOTIONS
    return [way for way in DIRECTIONS if held == ((event.kind, way) in HELD_MOTIONS)]


def _about_things(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    spinning = {event.subject for event in scene.events if event.kind == "spin"}
    for index, thing in enumerate(scene.things):
        rest = _deed_words(scene, index)
        held = is_held_pair(thing.digit, thing.colour)
        if sum(other.digit == thing.digit for other in scene.things) == 1:
            others = [c for c in COLOURS if c != thing.colour and is_held_pair(thing.digit, c) == held]
            pairs = [(c, f"the {c} {thing.digit} {rest}") for c in _some(rng, thing.colour, others)]
            if len(pairs) == _NUM_OPTIONS:
                found.append(_ask(rng, "colour", f"what colour is the {thing.digit}", pairs))
        if index not in spinning:  # only some digits spin: the marginal would not be flat
            others = [d for d in map(str, range(10)) if int(d) != thing.digit]
            others = [d for d in others if is_held_pair(int(d), thing.colour) == held]
            digits = _some(rng, str(thing.digit), others)
            pairs = [(d, f"the {thing.colour} {d} {rest}") for d in digits]
            if len(pairs) == _NUM_OPTIONS:
                found.append(_ask(rng, "digit", f"which digit is {thing.colour}", pairs))
    return found + _about_actors(scene, rng)


def _some(rng: np.random.Generator, answer: str, others: list[str]) -> list[str]:
    chosen = rng.permutation(len(others))[: _NUM_OPTIONS - 1]
    return [answer, *(others[int(place)] for place in chosen)]


def _about_actors(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask who does it, or who stays still; the options are the scene's own things."""
    found = []
    names = [thing_words(scene, index, _PLAIN) for index in range(len(scene.things))]
    if len(names) < 2:
        return []
    for event in scene.timeline:
        same = [other for other in scene.events if other.kind == event.kind]
        if len(same) > 1 or event.kind == "swap":
            continue
        if event.kind == "spin" and not all(thing.digit in SPIN_DIGITS for thing in scene.things):
            continue
        does = " ".join(
            [VERBS[0][event.kind], event.direction or "", COUNTS[event.count - 1] if event.count else ""]
        )
        pairs = [(name, f"{name} {does}") for name in names]
        asked = " ".join(f"what {does}".split())
        found.append(_ask(rng, "actor", asked, pairs, event.subject))
    still = still_things(scene)
    if len(still) == 1:
        pairs = [(name, f"{name} {VERBS[0]['still']}") for name in names]
        found.append(_ask(rng, "still", f"what {VERBS[0]['still']}", pairs, still[0]))
    return found


def _deed_words(scene: Scene, index: int) -> str:
    """What the thing does first, as the rest of a sentence about it."""
    for event in scene.timeline:
        if event.kind == "swap" and index in (event.subject, event.partner):
            other = event.partner if index == event.subject else event.subject
            return f"{VERBS[0]['swap']} {thing_words(scene, other or 0, _PLAIN)}"
        if event.subject == index:
            return " ".join(event_words(scene, event, _PLAIN, it=True).split()[1:])
    return VERBS[0]["still"]


def _about_order(scene: Scene, rng: np.random.Generator) -> list[Question]:
    timeline = scene.timeline
    if len(timeline) != 2 or not is_then(*timeline):
        return []
    first, second = ((event.kind, event.direction) for event in timeline)
    if is_held_order(first, second) != is_held_order(second, first):
        return []  # only one of the two orders occurs in this split: the options alone would tell
    clauses = [event_words(scene, event, _PLAIN) for event in timeline]
    orders = [f"{clauses[0]} then {clauses[1]}", f"{clauses[1]} then {clauses[0]}"]
    return [
        _ask(rng, "first", "what happens first", list(zip(clauses, orders, strict=True))),
        _ask(rng, "last", "what happens last", list(zip(clauses, orders[::-1], strict=True)), 1),
    ]


def _about_places(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    for first, second in left_pairs(scene):
        truly = bool(rng.random() < 0.5)
        one, other = (first, second) if truly else (second, first)
        claim = left_words(scene, one, other, _PLAIN)
        subject, _, rest = claim.partition(" is ")
        pairs = [("yes", claim), ("no", left_words(scene, other, one, _PLAIN))]
        found.append(_ask(rng, "place", f"is {subject} {rest}", pairs, 0 if truly else 1))
    return found


@lru_cache(maxsize=1)
def vocabulary() -> list[str]:
    """Return every word of captions, questions and options, sorted; the world never uses another."""
    said = [*COLOURS, *map(str, range(10)), *DIRECTIONS, *SENSES, *COUNTS, *SPEEDS, *ARTICLES, *THEN, *WHILE]
    said += [phrase for verbs in VERBS for phrase in verbs.values()]
    said += ["an", "it", "waits and", "and stops", "nonstop", *QUESTION_WORDS]
    return sorted({word for phrase in said for word in phrase.split()})
