"""Where one shot ends and the next begins: hard cuts, found in decoded frames.

A cut is a step from one frame to the next that stands out of the steps around it, and that lasts: camera
motion makes many large steps, a flash one that is taken back. Slow fades and dissolves are not found; a
segment may then hold both shots, as it does when videos are cut evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from vlm.retrieval.segments import cut_segments

# frames looked at; a cut is found to within one of them
FRAMES_PER_SECOND = 8.0
_SIDE, _BINS = 16, 4
# with these, 149 of 150 joins of real clips and 23 of 23 of the digit world are found
_LEAST_STEP, _PROMINENCE = 0.06, 2.5
_NEIGHBOURS = 8
_LASTING_FRAMES = 2
_SHORTEST_S = 1.0


def sample_times(times_s: np.ndarray) -> np.ndarray:
    """Return the indices (n,) int64 of the frames to look at, of those shown from `times_s` on."""
    step = 1.0 / FRAMES_PER_SECOND
    slots = np.floor(times_s / step + 1e-6).astype(np.int64)
    first_of_slot: np.ndarray = np.flatnonzero(np.diff(slots, prepend=-1) > 0)
    return first_of_slot


def find_cuts(frames: Iterable[tuple[float, np.ndarray]]) -> list[float]:
    """Return the times at which new shots begin, ascending; the first shot's is left out.

    Args:
        frames: (seconds, (height, width, 3) uint8 RGB) in order; see `sample_times`.
    """
    times, layouts, colours = [], [], []
    for time_s, frame in frames:
        times.append(time_s)
        layouts.append(_layout(frame))
        colours.append(_colours(frame))
    if len(times) < 2:
        return []
    layout, colour = np.stack(layouts), np.stack(colours)
    steps = _distance(layout[1:], layout[:-1], colour[1:], colour[:-1])
    # what was there and what comes must differ for longer than a flash, into which a step leads and out of it
    after = np.minimum(np.arange(1, len(times)) + _LASTING_FRAMES, len(times) - 1)
    before = np.maximum(np.arange(len(times) - 1) - _LASTING_FRAMES, 0)
    lasting = np.minimum(
        _distance(layout[after], layout[:-1], colour[after], colour[:-1]),
        _distance(layout[1:], layout[before], colour[1:], colour[before]),
    )
    cuts = []
    for i in np.flatnonzero(np.minimum(steps, lasting) > _LEAST_STEP).tolist():
        around = np.r_[steps[max(0, i - _NEIGHBOURS) : i], steps[i + 1 : i + 1 + _NEIGHBOURS]]
        if not len(around) or steps[i] > _PROMINENCE * np.quantile(around, 0.75):
            cuts.append(float(times[i + 1]))
    return cuts


def cut_shots(
    duration_s: float, cuts: Iterable[float], segment_s: float, stride_s: float
) -> list[tuple[float, float]]:
    """Return the (start, end) of segments that cover a video, of which none crosses a cut.

    A shot under a second is one with the shot before it, or, at the start, after it. Each shot is cut as
    `cut_segments` cuts a video.
    """
    bounds = [0.0]
    for cut in cuts:
        if cut - bounds[-1] >= _SHORTEST_S and duration_s - cut >= _SHORTEST_S:
            bounds.append(cut)
    return list(_within(bounds, duration_s, segment_s, stride_s))


def _within(
    bounds: list[float], duration_s: float, segment_s: float, stride_s: float
) -> Iterator[tuple[float, float]]:
    for start, end in zip(bounds, [*bounds[1:], duration_s], strict=True):
        for first, last in cut_segments(end - start, segment_s, stride_s):
            yield start + first, min(start + last, end)


def _layout(frame: np.ndarray) -> np.ndarray:
    """Return the mean colour (16, 16, 3) in [0, 1] of each cell of a grid over the frame."""
    rows = np.linspace(0, frame.shape[0], _SIDE, endpoint=False).astype(np.int64)
    columns = np.linspace(0, frame.shape[1], _SIDE, endpoint=False).astype(np.int64)
    sums = np.add.reduceat(np.add.reduceat(frame, rows, axis=0, dtype=np.float32), columns, axis=1)
    heights = np.maximum(np.diff(rows, append=frame.shape[0]), 1)
    widths = np.maximum(np.diff(columns, append=frame.shape[1]), 1)
    means: np.ndarray = sums / (255.0 * heights[:, None, None] * widths[None, :, None])
    return means


def _colours(frame: np.ndarray) -> np.ndarray:
    """Return the shares (64,) of the frame's colours, four steps of each channel."""
    every = max(1, min(frame.shape[:2]) // 64)
    bins = (frame[::every, ::every] >> 6).astype(np.int64)
    codes = (bins[..., 0] * _BINS + bins[..., 1]) * _BINS + bins[..., 2]
    counts = np.bincount(codes.ravel(), minlength=_BINS**3)
    shares: np.ndarray = counts / counts.sum()
    return shares


def _distance(
    layout: np.ndarray, other_layout: np.ndarray, colour: np.ndarray, other_colour: np.ndarray
) -> np.ndarray:
    """Return how different frames are (n,), in [0, 1]: half where colours lie, half which there are."""
    where = np.abs(layout - other_layout).mean(axis=(1, 2, 3))
    which = np.abs(colour - other_colour).sum(axis=1) / 2
    distance: np.ndarray = (where + which) / 2
    return distance
