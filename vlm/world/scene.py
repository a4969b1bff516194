"""What a clip is: a frozen value from which its frames, caption, questions and truth all follow.

Positions are in units of 1/64 of the picture's side, x to the right, y down, on a torus: what leaves on
one side comes back on the other. Times are frame numbers, 0 to 39.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

VERSION = "world-v1"
NUM_FRAMES = 40
FPS = 8
SIDE = 64
LAST = NUM_FRAMES - 1

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 45, 40),
    "orange": (255, 145, 20),
    "yellow": (250, 245, 45),
    "green": (45, 225, 60),
    "cyan": (40, 225, 240),
    "blue": (70, 95, 255),
    "pink": (255, 75, 225),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
}
KINDS = ("move", "zigzag", "circle", "spin", "bounce", "blink", "swap")
SPIN_DIGITS = frozenset({2, 3, 4, 5, 7})  # 0, 1, 8 look alike turned; 6 and 9 turn into each other


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A digit: which image, its class and colour, its side, and where its centre is at stored frame 0."""

    image: int
    digit: int
    colour: str
    size: float
    x: float
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happens: the state at frame ``start`` is the old one, at frame ``end`` the new one.

    Attributes:
        kind: One of ``KINDS``.
        direction: A side for move and zigzag, a sense for circle and spin, None for the time-symmetric kinds.
        subject: Index of the thing it happens to.
        partner: Index of the other thing of a swap.
        start: Last frame of the state before.
        end: First frame of the state after.
        speed: ``slowly`` or ``quickly`` for moves.
        count: How often, for bounce and blink.
        dx: Net displacement of the subject in x (move, zigzag, swap).
        dy: Net displacement of the subject in y.
        phase: Where on its circle the subject is at ``start``, in turns (circle).
    """

    kind: str
    direction: str | None
    subject: int
    start: int
    end: int
    partner: int | None = None
    speed: str | None = None
    count: int | None = None
    dx: float = 0.0
    dy: float = 0.0
    phase: float = 0.0

    def backwards(self) -> Event:
        """Return the same event as seen when the clip is played backwards (what happens, not the path)."""
        return replace(
            self,
            direction=OPPOSITE[self.direction] if self.direction else None,
            start=LAST - self.end,
            end=LAST - self.start,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Distractor:
    """A grey shape that drifts through the picture and is never described; velocities per frame."""

    shape: str
    size: float
    grey: int
    x: float
    y: float
    vx: float
    vy: float
    in_front: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """A periodic texture: index in the bank, darkness, contrast, tint, offset and panning per frame."""

    texture: int
    base: float
    contrast: float
    tint: tuple[float, float, float]
    x: float
    y: float
    vx: float
    vy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything about a clip.

    Attributes:
        split: Which split it was drawn for; decides writers, combinations and caption templates.
        seed: Seed of the stream it comes from.
        index: Its place in that stream.
        things: One to three digits, in drawing order.
        events: One to four events in *stored* time.
        background: Texture and panning.
        distractors: Undescribed moving shapes.
        brightness: Depth of the brightness walk.
        noise: Standard deviation of the pixel noise, in grey levels.
        noise_seed: Key of the pixel noise and the brightness walk.
        wording_seed: Key of what the caption mentions and how; a twin shares it.
        reversed: Whether frame f shows stored time 39 - f.
    """

    split: str
    seed: int
    index: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    background: Background
    distractors: tuple[Distractor, ...]
    brightness: float
    noise: float
    noise_seed: int
    wording_seed: int
    reversed: bool = False

    @property
    def timeline(self) -> tuple[Event, ...]:
        """The events as seen, by start frame; ``dx``, ``dy`` and ``phase`` stay in stored time."""
        seen = [event.backwards() for event in self.events] if self.reversed else list(self.events)
        return tuple(sorted(seen, key=lambda event: (event.start, event.end, event.subject)))

    def backwards(self) -> Scene:
        """Return the scene whose clip is this one's, played backwards."""
        return replace(self, reversed=not self.reversed)

    @property
    def clip_id(self) -> str:
        """Name of the clip, such as ``test-7-000012-a``; its reversed twin has the other letter."""
        return f"{self.split}-{self.seed}-{self.index:06d}" + ("-b" if self.reversed else "-a")

    def to_json(self) -> str:
        """Return one line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: The text is not a scene.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            raw["things"] = tuple(Thing(**thing) for thing in raw["things"])
            raw["events"] = tuple(Event(**event) for event in raw["events"])
            raw["distractors"] = tuple(Distractor(**item) for item in raw["distractors"])
            background = raw["background"]
            raw["background"] = Background(**{**background, "tint": tuple(background["tint"])})
            return cls(**raw)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected a scene written by Scene.to_json, got something else: {error}"
            ) from error
