"""Single pictures of the digit world: one thing, and its name for a caption."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from vlm.world import Scene, sample_scene
from vlm.world.captions import templates, thing_words
from vlm.world.facts import thing_name
from vlm.world.motion import motion
from vlm.world.scene import NUM_FRAMES

_TRIES = 64  # scenes that belong to one picture: nearly always one of them fits


class Picture(NamedTuple):
    """A frame of a scene of one thing, ``name`` (colour, digit), that is to be seen in it."""

    scene: Scene
    frame: int
    name: tuple[str, int]
    caption: str


def draw_picture(split: str, seed: int, number: int, rng: np.random.Generator) -> Picture:
    """Return picture ``number`` of a stream.

    Args:
        split: Whose digits, combinations and wordings.
        seed: Of the stream of scenes.
        number: Counts pictures from 0.
        rng: Chooses the frame and the wording.
    """
    scene = next(
        scene
        for scene in (sample_scene(split, seed, index) for index in itertools.count(number * _TRIES))
        if len(scene.things) == 1
    )
    visible = np.flatnonzero(motion(scene, np.arange(NUM_FRAMES)).visible[0])
    frame = int(visible[rng.integers(len(visible))])
    wordings = templates(split)
    caption = thing_words(scene, 0, wordings[int(rng.integers(len(wordings)))])
    return Picture(scene, frame, thing_name(scene, 0), caption)
