"""Where every thing is at every frame: paths as functions of an event's progress, 0 to 1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.world.scene import DIRECTIONS, LAST, Event, Scene

Array = npt.NDArray[np.float64]

HOP = 12.0  # height of a bounce
RADIUS = 9.0  # of a circle
SWAY = 6.0  # to either side of a zigzag
HOP_FRAMES = 12  # one bounce
SWEEP_FRAMES = 13  # once to either side of a zigzag, about
BLINK_FRAMES = 12  # six frames away, six frames back: every 5th frame is sampled, so each absence is seen
AWAY_FRAMES = 6


class Motion(NamedTuple):
    """Paths at the asked frames, all (things, frames): centre (unwrapped), angle in turns, visibility."""

    x: Array
    y: Array
    angle: Array
    visible: npt.NDArray[np.bool_]


def motion(scene: Scene, frames: npt.NDArray[np.int64]) -> Motion:
    """Return the state of every thing at ``frames`` (t,), the clip's own frame numbers."""
    stored = LAST - frames if scene.reversed else frames
    shape = (len(scene.things), len(frames))
    x, y = np.empty(shape), np.empty(shape)
    for index, thing in enumerate(scene.things):
        x[index], y[index] = thing.x, thing.y
    angle = np.zeros(shape)
    visible = np.ones(shape, dtype=bool)
    for event in scene.events:
        progress = np.clip((stored - event.start) / (event.end - event.start), 0.0, 1.0)
        subject = event.subject
        if event.kind == "spin":
            angle[subject] += _sense(event) * (progress % 1.0)
        elif event.kind == "blink":
            visible[subject] &= ~_away(event, stored)
        else:
            dx, dy = _offset(event, progress)
            x[subject] += dx
            y[subject] += dy
            if event.kind == "swap" and event.partner is not None:
                x[event.partner] -= dx
                y[event.partner] -= dy
    return Motion(x, y, angle, visible)


def _sense(event: Event) -> float:
    return 1.0 if event.direction == "clockwise" else -1.0


def _away(event: Event, stored: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    since = stored - event.start - 1
    inside = (since >= 0) & (stored < event.end)
    return inside & (since % BLINK_FRAMES < AWAY_FRAMES)


def _offset(event: Event, progress: Array) -> tuple[Array, Array]:
    """Displacement of the subject since the event began."""
    if event.kind == "move":
        return event.dx * progress, event.dy * progress
    if event.kind == "zigzag":
        side_x, side_y = DIRECTIONS[event.direction or "left"]
        sweeps = max(1, round((event.end - event.start) / SWEEP_FRAMES))
        sway = SWAY * np.sin(2 * np.pi * sweeps * progress)
        return event.dx * progress - side_y * sway, event.dy * progress + side_x * sway
    if event.kind == "circle":
        start = 2 * np.pi * event.phase
        now = start + _sense(event) * 2 * np.pi * progress
        return RADIUS * (np.cos(now) - np.cos(start)), RADIUS * (np.sin(now) - np.sin(start))
    if event.kind == "bounce":
        within = ((event.count or 1) * progress) % 1.0
        return np.zeros_like(progress), -HOP * 4 * within * (1 - within)
    if event.kind == "swap":
        along = (1 - np.cos(np.pi * progress)) / 2
        across = np.sin(np.pi * progress) / 2 * 0.6
        return event.dx * along - event.dy * across, event.dy * along + event.dx * across
    raise ValueError(f"expected a kind with a path, got {event.kind!r}")
