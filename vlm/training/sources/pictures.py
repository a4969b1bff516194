"""Single pictures of the digit world: one thing, and its name for a caption."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vlm.world import Scene, sample_scene
from vlm.world.captions import templates, thing_words
from vlm.world.facts import thing_name
from vlm.world.scene import NUM_FRAMES

PICTURE_WORDS = 3  # of the longest caption, such as ``the red 7``


class Picture(NamedTuple):
    """A frame of a scene in which one thing, ``name`` (colour, digit), stays where it is."""

    scene: Scene
    frame: int
    name: tuple[str, int]
    caption: str


def draw_picture(split: str, seed: int, number: int, rng: np.random.Generator) -> Picture:
    """Return picture ``number``: a thing of scene ``number`` of the stream, alone before its background.

    Args:
        split: Whose digits, combinations and wordings.
        seed: Of the stream of scenes.
        number: Counts pictures from 0.
        rng: Chooses the thing, the frame and the wording.
    """
    scene = sample_scene(split, seed, number)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    alone = replace(scene, things=(thing,), events=())
    wordings = templates(split)
    caption = thing_words(alone, 0, wordings[int(rng.integers(len(wordings)))])
    return Picture(alone, int(rng.integers(NUM_FRAMES)), thing_name(alone, 0), caption)
