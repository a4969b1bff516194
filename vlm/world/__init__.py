"""A world that is known exactly: handwritten digits that move, and every caption's truth.

Two rules decide its shape. Whatever has a direction lives on a circle (positions on a torus, angles), so
that no single frame gives a direction away; and whether a scene is shown forwards or backwards is a fair
coin, so that a clip and its reversed twin are equally likely. NumPy only, except for the clip writer.
"""

from vlm.world.captions import Template, caption, templates
from vlm.world.facts import ACTIONS, Facts, action, facts, is_true, truth_matrix
from vlm.world.questions import Question, questions, vocabulary
from vlm.world.render import render, sample_frames
from vlm.world.sampling import gallery, sample_scene
from vlm.world.scene import FPS, NUM_FRAMES, Scene
from vlm.world.splits import SPLITS
from vlm.world.twins import has_twin, recast, twin, variants

__all__ = [
    "ACTIONS",
    "FPS",
    "NUM_FRAMES",
    "SPLITS",
    "Facts",
    "Question",
    "Scene",
    "Template",
    "action",
    "caption",
    "facts",
    "gallery",
    "has_twin",
    "is_true",
    "questions",
    "recast",
    "render",
    "sample_frames",
    "sample_scene",
    "templates",
    "truth_matrix",
    "twin",
    "variants",
    "vocabulary",
]
