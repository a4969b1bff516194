"""Drawing scenes: a counter-based stream for each split, and the galleries made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.world.captions import SPEEDS
from vlm.world.digits import images_of
from vlm.world.facts import KINDS_WITH_WAY
from vlm.world.motion import BLINK_FRAMES, HOP_FRAMES, motion
from vlm.world.scene import (
    COLOURS,
    DIRECTIONS,
    LAST,
    NUM_FRAMES,
    SIDE,
    Background,
    Distractor,
    Event,
    Scene,
    Thing,
)
from vlm.world.splits import BLOCK_OF, SPLITS, belongs, held_combinations, is_sound
from vlm.world.twins import has_twin

_KEY = 20261122  # of every random stream of this version of the world
_ALL_FRAMES = np.arange(NUM_FRAMES)
NUM_TEXTURES = 60
NUM_OOD_TEXTURES = 30  # of other families, which follow the 60 in the bank
OOD_SIZES = (14.0, 14.5, 15.0, 15.5, 16.0, 23.5, 24.5, 25.5, 26.5)  # elsewhere 18 to 22


class Plan(NamedTuple):
    """How many things, and how many events at once in each slot of time, with its weights."""

    things: int
    slots: tuple[int, ...]
    train: float
    test: float


# the same support everywhere; training sees more of the simple ones, which is where learning starts
PLANS = (
    Plan(1, (1,), 20, 2),
    Plan(1, (1, 1), 10, 6),
    Plan(1, (1, 1, 1), 4, 5),
    Plan(2, (1,), 16, 6),
    Plan(2, (2,), 14, 12),
    Plan(2, (1, 1), 14, 16),
    Plan(2, (1, 1, 1), 4, 8),
    Plan(2, (2, 1), 3, 5),
    Plan(2, (1, 2), 3, 5),
    Plan(2, (2, 2), 2, 5),
    Plan(3, (1,), 2, 3),
    Plan(3, (2,), 2, 8),
    Plan(3, (1, 1), 3, 9),
    Plan(3, (1, 1, 1), 2, 6),
    Plan(3, (2, 1), 0.5, 2),
    Plan(3, (1, 1, 1, 1), 0.5, 2),
)
# kind: (weight, shortest and longest duration in frames)
KIND_WEIGHTS = {
    "move": (0.42, 7, 18),
    "zigzag": (0.12, 15, 20),
    "circle": (0.14, 16, 22),
    "spin": (0.1, 16, 22),
    "bounce": (0.09, 0, 0),
    "blink": (0.07, 0, 0),
    "swap": (0.06, 12, 18),
}
REST = 2  # frames between two slots, at least: one after the other must look like it
SPEED_RANGES = {"slowly": (0.8, 1.05), "quickly": (2.0, 2.5), "zigzag": (1.2, 1.6)}  # units per frame


def sample_scene(split: str, seed: int, index: int) -> Scene:
    """Return scene ``index`` of the stream ``(split, seed)``: a pure function, the same on every machine.

    Raises:
        ValueError: ``split`` is not one of ``SPLITS``, or ``seed`` or ``index`` is negative.
    """
    if split not in SPLITS or seed < 0 or index < 0:
        raise ValueError(f"expected a split of {SPLITS}, seed >= 0, index >= 0; got {split}, {seed}, {index}")
    keys = np.random.SeedSequence([_KEY, SPLITS.index(split), seed, index])
    rng = np.random.Generator(np.random.Philox(keys))
    wanted = ("digit-colour", "kind-direction", "event-order")[index % 3] if split == "combo" else None
    while True:
        scene = _draft(rng, split, seed, index)
        if scene is None or not is_sound(scene) or not belongs(scene, split):
            continue
        if wanted is not None and wanted not in held_combinations(scene):
            continue
        placed = _placed(rng, scene)
        if placed is not None:
            return placed


def gallery(split: str, seed: int, count: int, twins: bool = False) -> Iterator[Scene]:
    """Yield ``count`` scenes of a stream; with ``twins`` only those that have one, each followed by it."""
    index = found = 0
    while found < count:
        scene = sample_scene(split, seed, index)
        index += 1
        if twins and not has_twin(scene):
            continue
        found += 1
        yield scene
        if twins:
            yield scene.backwards()


def _pick(rng: np.random.Generator, weights: list[float]) -> int:
    point = rng.random() * sum(weights)
    for place, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return place
    return len(weights) - 1


def _draft(rng: np.random.Generator, split: str, seed: int, index: int) -> Scene | None:
    """Draw content and timing; None when the draw contradicts itself. Positions come later."""
    plan = PLANS[_pick(rng, [p.train if split == "train" else p.test for p in PLANS])]
    colours = rng.permutation(len(COLOURS))[: plan.things]
    things = []
    for colour in colours:
        digit = int(rng.integers(10))
        choices = images_of(BLOCK_OF[split], digit)
        image = choices[int(rng.integers(len(choices)))]
        draw = int(rng.integers(9))
        size = OOD_SIZES[draw] if split == "ood" else 18.0 + draw / 2
        colour_name = list(COLOURS)[colour]
        things.append(Thing(image=image, digit=digit, colour=colour_name, size=size, x=0.0, y=0.0))
    slots = [_draw_slot(rng, plan.things, parallel) for parallel in plan.slots]
    if any(slot is None for slot in slots):
        return None
    events = _schedule(rng, [slot for slot in slots if slot is not None])
    if events is None:
        return None
    words = rng.integers(0, 2**31, size=2)
    return Scene(
        split=split,
        seed=seed,
        index=index,
        things=tuple(things),
        events=tuple(events),
        background=Background(
            texture=0, base=0.0, contrast=0.0, tint=(1.0, 1.0, 1.0), x=0.0, y=0.0, vx=0.0, vy=0.0
        ),
        distractors=(),
        brightness=0.0,
        noise=0.0,
        noise_seed=int(words[0]),
        wording_seed=int(words[1]),
        reversed=bool(rng.random() < 0.5),
    )


def _draw_slot(rng: np.random.Generator, num_things: int, parallel: int) -> list[Event] | None:
    """Draw what happens at the same time, durations in ``end``; None if more things would be needed."""
    free = list(rng.permutation(num_things))
    events = []
    for _ in range(parallel):
        kind = list(KIND_WEIGHTS)[_pick(rng, [row[0] for row in KIND_WEIGHTS.values()])]
        if len(free) < (2 if kind == "swap" else 1):
            return None
        subject = int(free.pop())
        partner = int(free.pop()) if kind == "swap" else None
        direction = count = speed = None
        _, low, high = KIND_WEIGHTS[kind]
        duration = int(rng.integers(low, high + 1)) if high else 0
        if kind in KINDS_WITH_WAY:
            direction = list(DIRECTIONS)[int(rng.integers(4))]
            speed = SPEEDS[int(rng.integers(2))] if kind == "move" else None
        elif kind in ("circle", "spin"):
            direction = ("clockwise", "counterclockwise")[int(rng.integers(2))]
        elif kind in ("bounce", "blink"):
            count = 1 + int(rng.integers(3))
            duration = duration_of(kind, count)
        events.append(
            Event(
                kind=kind,
                direction=direction,
                subject=subject,
                partner=partner,
                start=0,
                end=duration,
                speed=speed,
                count=count,
            )
        )
    return events


def duration_of(kind: str, count: int) -> int:
    """Return how many frames it takes to bounce or blink ``count`` times."""
    return HOP_FRAMES * count if kind == "bounce" else BLINK_FRAMES * count - 5


def _schedule(rng: np.random.Generator, slots: list[list[Event]]) -> list[Event] | None:
    """Give every event its frames; None if they do not fit into the clip."""
    if len(slots) == 1 and len(slots[0]) == 1 and slots[0][0].kind in KINDS_WITH_WAY:
        return [_with_bearing(rng, slots[0][0])]
    lengths = [
        [e.end if e.kind in ("bounce", "blink") else _shortest(e.kind) for e in slot] for slot in slots
    ]
    spare = LAST - 2 - sum(max(row) for row in lengths) - REST * (len(slots) - 1)
    if spare < 0:
        return None
    timed: list[Event] = []
    shares = rng.multinomial(spare, [1 / (2 * len(slots) + 1)] * (2 * len(slots) + 1))
    now = 1 + int(shares[0])
    for place, (slot, row) in enumerate(zip(slots, lengths, strict=True)):
        extra = int(shares[2 * place + 1])
        span = max(row) + extra
        for event, shortest in zip(slot, row, strict=True):
            fixed = event.kind in ("bounce", "blink")
            length = shortest if fixed else min(max(shortest, event.end), span)
            length = max(length, -(-2 * span // 3)) if not fixed else length
            start = now + (span - length) // 2
            timed.append(replace(event, start=start, end=start + length))
        now += span + REST + int(shares[2 * place + 2])
    return timed


def _shortest(kind: str) -> int:
    return KIND_WEIGHTS[kind][1]


def _with_bearing(rng: np.random.Generator, event: Event) -> Event:
    """Let a movement that has the clip to itself stop, wait, go on throughout, or lie in the middle."""
    middle = int(rng.integers(16, 23))
    late = LAST - middle
    start, end = ((0, LAST), (0, middle), (late, LAST), (late // 2, late // 2 + middle))[int(rng.integers(4))]
    return replace(event, start=start, end=end)


def _placed(rng: np.random.Generator, scene: Scene) -> Scene | None:
    """Give a drafted scene its paths, places and looks; None if the things find no room."""
    events = tuple(_with_path(rng, event) for event in scene.events)
    scene = replace(scene, events=events)
    still, free = motion(scene, _ALL_FRAMES), free_axes(scene)
    together = rng.random((3, 3)) < 0.12  # pairs that may share a lane, and so hide one another
    for _ in range(60):
        things = tuple(
            replace(
                thing,
                x=_place(rng, thing, still.x[i], (i, 0) in free),
                y=_place(rng, thing, still.y[i], (i, 1) in free),
            )
            for i, thing in enumerate(scene.things)
        )
        tried = _with_swap(replace(scene, things=things))
        if tried is not None and has_room(tried, together):
            return replace(tried, **draw_looks(rng, scene.split))
    return None


def _with_path(rng: np.random.Generator, event: Event) -> Event:
    if event.kind == "circle":
        return replace(event, phase=round(float(rng.random()), 3))
    if event.direction not in DIRECTIONS:
        return event
    low, high = SPEED_RANGES[event.speed or "zigzag"]
    length = round((low + (high - low) * float(rng.random())) * (event.end - event.start), 2)
    side_x, side_y = DIRECTIONS[event.direction]
    return replace(event, dx=side_x * length, dy=side_y * length)


def _place(rng: np.random.Generator, thing: Thing, offsets: npt.NDArray[np.float64], free: bool) -> float:
    """Draw one coordinate: anywhere on the torus along a way, else so that no edge ever cuts the thing."""
    low, high = float(offsets.min()), float(offsets.max())
    if free:
        return round(SIDE * float(rng.random()), 2)
    first, last = thing.size / 2 - low, SIDE - thing.size / 2 - high
    return round(first + (last - first) * float(rng.random()), 2)


def free_axes(scene: Scene) -> set[tuple[int, int]]:
    """Return (thing, axis 0 = x or 1 = y) for every way: there the thing may be anywhere on the torus."""
    ways = [event for event in scene.events if event.kind in KINDS_WITH_WAY]
    return {(e.subject, axis) for e in ways for axis, length in enumerate((e.dx, e.dy)) if length}


def _with_swap(scene: Scene) -> Scene | None:
    events = []
    for event in scene.events:
        if event.kind == "swap" and event.partner is not None:
            one, other = scene.things[event.subject], scene.things[event.partner]
            dx, dy = round(other.x - one.x, 2), round(other.y - one.y, 2)
            if not 24.0 <= float(np.hypot(dx, dy)) <= 40.0:
                return None
            event = replace(event, dx=dx, dy=dy)
        events.append(event)
    return replace(scene, events=tuple(events))


def has_room(scene: Scene, together: npt.NDArray[np.bool_]) -> bool:
    """Whether things keep to lanes of their own wherever lanes exist.

    Only coordinates without a way count: a test that looked at where ways lead would let the places in
    the first frame tell the directions.
    """
    paths, free = motion(scene, _ALL_FRAMES), free_axes(scene)
    partners = {frozenset((e.subject, e.partner)) for e in scene.events if e.kind == "swap"}
    for first, second in combinations(range(len(scene.things)), 2):
        if frozenset((first, second)) in partners:
            continue
        reach = 0.4 * (scene.things[first].size + scene.things[second].size)
        lanes = [
            (path[first], path[second])
            for axis, path in enumerate((paths.x, paths.y))
            if (first, axis) not in free and (second, axis) not in free
        ]
        apart = any(a.min() - b.max() >= reach or b.min() - a.max() >= reach for a, b in lanes)
        resting = len(lanes) == 2
        if lanes and not apart and (resting or not together[first, second]):
            return False
    return True


def draw_looks(rng: np.random.Generator, split: str) -> dict[str, Any]:
    """Draw the looks of a scene of a split, by the names of its fields; none of them knows what happens.

    Background, distractors, brightness and noise.
    """
    background = Background(
        texture=NUM_TEXTURES + int(rng.integers(NUM_OOD_TEXTURES))
        if split == "ood"
        else int(rng.integers(NUM_TEXTURES)),
        base=round(12 + 28 * float(rng.random()), 1),
        contrast=round(14 + 42 * float(rng.random()), 1),
        tint=(_around(rng, 1.0, 0.15), _around(rng, 1.0, 0.15), _around(rng, 1.0, 0.15)),
        x=float(rng.integers(SIDE)),
        y=float(rng.integers(SIDE)),
        vx=_around(rng, 0.0, 0.9),
        vy=_around(rng, 0.0, 0.9),
    )
    distractors = tuple(
        Distractor(
            shape=("disc", "ring", "square")[int(rng.integers(3))],
            size=round(5 + 4 * float(rng.random()), 1),
            grey=int(rng.integers(110, 190)),
            x=round(SIDE * float(rng.random()), 2),
            y=round(SIDE * float(rng.random()), 2),
            vx=_around(rng, 0.0, 1.5),
            vy=_around(rng, 0.0, 1.5),
            in_front=bool(rng.random() < 0.3),
        )
        for _ in range(_pick(rng, [45, 35, 20]))
    )
    return {
        "background": background,
        "distractors": distractors,
        "brightness": round(0.04 * float(rng.random()), 3),
        "noise": round(2 + 5 * float(rng.random()), 2),
    }


def _around(rng: np.random.Generator, middle: float, reach: float) -> float:
    return round(middle + reach * (2 * float(rng.random()) - 1), 3)
