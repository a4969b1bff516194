"""Reels: many short scenes one after another, each of two things; what is known of one is who came when.

A reel is what few frames cannot cover: of sixteen scenes eight frames miss eight, and whoever looks at
frames one by one can tell who was there, but never who came first. What a scene shows is told by colours
alone, which any frame of it shows and a small model reads early; digits take it much longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.world.digits import images_of
from vlm.world.render import render
from vlm.world.sampling import draw_looks
from vlm.world.scene import COLOURS, DIRECTIONS, LAST, SIDE, Background, Event, Scene, Thing
from vlm.world.splits import BLOCK_OF, SPLITS, is_held_pair

NUM_SCENES = 16
MEAN_FRAMES = 20  # of a scene
SHORTEST_FRAMES = 10  # no shorter than the gap between two of 32 frames: these see every scene

_KEY = 20261201
_SIZES = (24.0, 28.0)  # two of them, each in a half of the picture of its own
_PATH = (6.0, 20.0)  # how far a thing that moves comes in 40 frames, short of any edge


class Atom(NamedTuple):
    """What a scene shows, as far as anything is asked about it: the colours of its two things."""

    first: str
    second: str

    @property
    def words(self) -> str:
        """The atom in words that captions use, such as ``a red and a blue``."""
        return " and ".join(f"{'an' if colour == 'orange' else 'a'} {colour}" for colour in self)


ATOMS = tuple(Atom(*colours) for colours in combinations(COLOURS, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reel:
    """Scenes in order, each shown for some of its frames.

    Attributes:
        split: Whose writers' digits it shows.
        seed: Seed of the stream it comes from.
        index: Its place in that stream.
        scenes: The scenes, of different atoms.
        lengths: Frames that each is shown for.
        mirrored: Whether the order of the scenes was turned round.
    """

    split: str
    seed: int
    index: int
    scenes: tuple[Scene, ...]
    lengths: tuple[int, ...]
    mirrored: bool = False

    @property
    def reel_id(self) -> str:
        """Name of the reel, such as ``reel-test-7-000012-a``; the mirrored one has the other letter."""
        return f"reel-{self.split}-{self.seed}-{self.index:06d}-{'b' if self.mirrored else 'a'}"

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """What the scenes show, in order."""
        return tuple(Atom(*(thing.colour for thing in scene.things)) for scene in self.scenes)

    @property
    def num_frames(self) -> int:
        """Frames of the whole reel."""
        return sum(self.lengths)

    def mirror(self) -> Reel:
        """Return the reel with the same scenes in the opposite order."""
        return replace(self, scenes=self.scenes[::-1], lengths=self.lengths[::-1], mirrored=not self.mirrored)


def sample_reels(split: str, seed: int, index: int, num_scenes: int = NUM_SCENES) -> tuple[Reel, Reel]:
    """Return reels ``2 index`` and ``2 index + 1`` of a stream: a pure function, the same on every machine.

    No reel shows an atom twice, and the two share as few as they can: eleven of sixteen, none of up to ten.

    Args:
        split: ``train``, ``val`` or ``test``: writers of which no other split has any.
        seed: Of the stream.
        index: Of the pair of reels.
        num_scenes: Scenes of each reel, 2 to 20.

    Raises:
        ValueError: An argument is not what it says above.
    """
    if split not in ("train", "val", "test") or seed < 0 or index < 0:
        raise ValueError(f"expected train, val or test, seed >= 0, index >= 0; got {split}, {seed}, {index}")
    if not 2 <= num_scenes < len(ATOMS):
        raise ValueError(f"expected 2 to {len(ATOMS) - 1} scenes, got {num_scenes}")
    keys = [_KEY, SPLITS.index(split), seed, index, num_scenes]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(keys)))
    drawn = rng.permutation(len(ATOMS))
    first, second = (
        Reel(
            split=split,
            seed=seed,
            index=2 * index + half,
            scenes=tuple(
                _scene(rng, ATOMS[atom], split, seed, (2 * index + half) * num_scenes + place)
                for place, atom in enumerate(rng.permutation(shown).tolist())
            ),
            lengths=_lengths(rng, num_scenes),
        )
        for half, shown in enumerate((drawn[:num_scenes], drawn[-num_scenes:]))
    )
    return first, second


def sampled(reel: Reel, num_frames: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the scene and the frame inside it of the middles of equal spans, (num_frames,) int64 each.

    Raises:
        ValueError: ``num_frames`` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"expected at least 1 frame, got {num_frames}")
    places = (2 * np.arange(num_frames) + 1) * reel.num_frames // (2 * num_frames)
    ends = np.cumsum(reel.lengths)
    scenes = np.searchsorted(ends, places, side="right")
    return scenes, places - (ends - np.asarray(reel.lengths))[scenes]


def render_reel(reel: Reel, num_frames: int, size: int = SIDE) -> npt.NDArray[np.uint8]:
    """Draw evenly sampled frames of a reel, (num_frames, size, size, 3) uint8, RGB.

    Raises:
        ValueError: As ``sampled`` and ``render`` do.
    """
    scenes, frames = sampled(reel, num_frames)
    return np.concatenate(
        [render(reel.scenes[number], frames[scenes == number], size) for number in np.unique(scenes)]
    )


def _lengths(rng: np.random.Generator, num_scenes: int) -> tuple[int, ...]:
    """Draw lengths of one fixed sum, alike for every place, none beyond the frames that a scene has."""
    spare = num_scenes * (MEAN_FRAMES - SHORTEST_FRAMES)
    while True:
        extra = rng.multinomial(spare, rng.dirichlet(np.full(num_scenes, 3.0)))
        if extra.max() <= LAST + 1 - SHORTEST_FRAMES:
            return tuple((SHORTEST_FRAMES + extra).tolist())


def _scene(rng: np.random.Generator, atom: Atom, split: str, seed: int, index: int) -> Scene:
    """Draw a scene of two things, one in each half of the picture; one moves a little, or none."""
    across = int(rng.integers(2))  # the axis that is halved
    halves = rng.permutation(2).tolist()
    mover = int(rng.integers(4))  # one of the two, or, as often, neither
    things, events = [], []
    for number, (colour, half) in enumerate(zip(atom, halves, strict=True)):
        digit = int(rng.choice([d for d in range(10) if not is_held_pair(d, colour)]))
        choices = images_of(BLOCK_OF[split], digit)
        size = round(_SIZES[0] + (_SIZES[1] - _SIZES[0]) * float(rng.random()), 1)
        way = round(_PATH[0] + (_PATH[1] - _PATH[0]) * float(rng.random()), 2)
        direction = (("up", "down"), ("left", "right"))[across][int(rng.integers(2))]
        dx, dy = (side * way * (number == mover) for side in DIRECTIONS[direction])
        if number == mover:
            events.append(
                Event(kind="move", direction=direction, subject=number, start=0, end=LAST, dx=dx, dy=dy)
            )
        place = [_room(rng, size, 0.0, half * SIDE / 2, SIDE / 2), _room(rng, size, dx + dy, 0.0, SIDE)]
        x, y = place if across == 0 else place[::-1]
        image = choices[int(rng.integers(len(choices)))]
        things.append(Thing(image=image, digit=digit, colour=colour, size=size, x=x, y=y))
    words = rng.integers(0, 2**31, size=2)
    bare = Scene(
        split=split,
        seed=seed,
        index=index,
        things=tuple(things),
        events=tuple(events),
        background=Background(texture=0, base=0, contrast=0, tint=(1, 1, 1), x=0, y=0, vx=0, vy=0),
        distractors=(),
        brightness=0.0,
        noise=0.0,
        noise_seed=int(words[0]),
        wording_seed=int(words[1]),
    )
    return replace(bare, **draw_looks(rng, split))


def _room(rng: np.random.Generator, size: float, shift: float, start: float, length: float) -> float:
    """Draw a coordinate from which a thing of this size never leaves its stretch of the picture."""
    low, high = start + size / 2 - min(shift, 0.0), start + length - size / 2 - max(shift, 0.0)
    return round(low + (high - low) * float(rng.random()), 2)
