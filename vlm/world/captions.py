"""Facts into words: templates (which wording) and the closed vocabulary they draw from."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from vlm.world.facts import (
    bearing,
    is_while,
    mentioned_places,
    mentions,
    mentions_sense,
    mentions_speed,
    still_things,
)
from vlm.world.scene import Event, Scene

COUNTS = ("once", "twice", "thrice")
SPEEDS = ("slowly", "quickly")
SENSES = ("clockwise", "counterclockwise")
VERBS = (
    {
        "move": "moves",
        "zigzag": "zigzags",
        "circle": "circles",
        "spin": "spins",
        "bounce": "bounces",
        "blink": "blinks",
        "swap": "swaps places with",
        "still": "stays still",
        "left": "is left of",
    },
    {
        "move": "goes",
        "zigzag": "weaves",
        "circle": "loops",
        "spin": "turns",
        "bounce": "hops",
        "blink": "flashes",
        "swap": "trades places with",
        "still": "does not move",
        "left": "is left of",
    },
)
ARTICLES = ("the", "a", "")
THEN = ("then", "and then", "before")
WHILE = ("while", "as")
MAX_WORDS = 30


class Template(NamedTuple):
    """One way to say a thing: indices into the tables above, and whether the adverb precedes the verb.

    An index beyond ``ARTICLES`` or ``VERBS`` takes the wordings in turn, thing by thing.
    """

    article: int
    verbs: int
    then: int
    meanwhile: int
    adverb_first: int

    @property
    def name(self) -> str:
        """Short name for manifests, such as ``01201``."""
        return "".join(map(str, self))


@lru_cache(maxsize=8)
def templates(split: str) -> tuple[Template, ...]:
    """Return the templates of a split: disjoint between train, val and test, every word known from train.

    A Latin-square rule sets one in six aside for the test splits and one in six for validation. Those of
    ``ood`` mix articles and verbs within one caption, as no other split does.
    """
    if split == "ood":
        mixed = product(range(3), range(2), range(2))
        return tuple(Template(len(ARTICLES), len(VERBS), *choice) for choice in mixed)
    every = [Template(*choice) for choice in product(range(3), range(2), range(3), range(2), range(2))]
    wanted = {"train": (0, 1, 2, 3), "val": (4,)}.get(split, (5,))
    rule = {t: (t.article + 2 * t.then + 3 * (t.verbs ^ t.meanwhile ^ t.adverb_first)) % 6 for t in every}
    return tuple(template for template in every if rule[template] in wanted)


def choose_template(scene: Scene) -> Template:
    """Return the wording that belongs to the scene, drawn from its split's templates by its wording seed."""
    choices = templates(scene.split)
    return choices[int(mentions(scene, 0) * len(choices))]


def caption(scene: Scene, template: Template | None = None, rng: np.random.Generator | None = None) -> str:
    """Return the scene's caption: lower-case words separated by single spaces, no punctuation.

    Args:
        scene: What to describe; every template states the same facts (``vlm.world.facts``).
        template: The wording; without it the scene's own, or with ``rng`` any of its split's.
        rng: Source of the choice of wording.
    """
    if template is None:
        choices = templates(scene.split)
        template = choose_template(scene) if rng is None else choices[int(rng.integers(len(choices)))]
    words = " ".join(_clauses(scene, template))
    return " ".join(words.split())


def _clauses(scene: Scene, template: Template) -> list[str]:
    parts: list[str] = []
    previous: Event | None = None
    parallel = False
    timeline = scene.timeline
    for place, event in enumerate(timeline):
        joined = previous is not None and is_while(previous, event)
        if previous is not None:
            parts.append(WHILE[template.meanwhile] if joined else THEN[template.then])
        following = timeline[place + 1] if place + 1 < len(timeline) else None
        alone = not parallel and not joined and (following is None or not is_while(event, following))
        parts.append(event_words(scene, event, template, _is_same(previous, event) and alone))
        previous, parallel = event, joined
    for index in still_things(scene):
        parts.append(("and " if parts else "") + still_words(scene, index, template))
    for first, second in mentioned_places(scene):
        parts.append("and " + left_words(scene, first, second, template))
    return parts


def _is_same(previous: Event | None, event: Event) -> bool:
    """Whether "it" would be understood: the same thing alone, twice running."""
    return (
        previous is not None
        and previous.subject == event.subject
        and previous.partner is None
        and event.partner is None
    )


def thing_words(scene: Scene, index: int, template: Template) -> str:
    """Return a thing's name, such as ``the red 3``."""
    thing = scene.things[index]
    article = ARTICLES[template.article if template.article < len(ARTICLES) else index % len(ARTICLES)]
    if article == "a" and thing.colour[0] in "aeiou":
        article = "an"
    return f"{article} {thing.colour} {thing.digit}".strip()


def event_words(scene: Scene, event: Event, template: Template, it: bool = False) -> str:
    """Return one event as a clause, such as ``the red 3 quickly moves left and stops``."""
    verbs = _verbs(template, event.subject)
    who = "it" if it else thing_words(scene, event.subject, template)
    if event.kind == "swap" and event.partner is not None:
        return f"{who} {verbs['swap']} {thing_words(scene, event.partner, template)}"
    said = [verbs[event.kind]]
    if event.direction is not None and mentions_sense(scene, event):
        said.append(event.direction)
    if event.speed is not None and mentions_speed(scene, event):
        said.insert(0 if template.adverb_first else len(said), event.speed)
    if event.count is not None:
        said.append(COUNTS[event.count - 1])
    stance = bearing(event) if len(scene.events) == 1 and event.kind in ("move", "zigzag") else None
    before, after = {"nonstop": ("", "nonstop"), "ends": ("", "and stops"), "waits": ("waits and", "")}.get(
        stance or "", ("", "")
    )
    return " ".join(f"{who} {before} {' '.join(said)} {after}".split())


def still_words(scene: Scene, index: int, template: Template) -> str:
    """Return the clause for a thing to which nothing happens."""
    return f"{thing_words(scene, index, template)} {_verbs(template, index)['still']}"


def left_words(scene: Scene, first: int, second: int, template: Template) -> str:
    """Return the clause that ``first`` is left of ``second``."""
    return (
        f"{thing_words(scene, first, template)} {_verbs(template, first)['left']} "
        f"{thing_words(scene, second, template)}"
    )


def _verbs(template: Template, index: int) -> dict[str, str]:
    return VERBS[template.verbs if template.verbs < len(VERBS) else index % len(VERBS)]


def longest_caption(scene: Scene) -> int:
    """Return the words of the longest wording of the scene."""
    return len(caption(scene, Template(0, 1, 1, 0, 0)).split())
