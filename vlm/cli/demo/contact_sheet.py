"""A picture of search results: each query with the frames of its hits, marked right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vlm.cli.demo import Outcome
    from vlm.types import Hit

_FRAME = 72
_FRAMES = 8
_MARGIN = 20
_LINE = 26
_GAP = 14
_BACKGROUND, _TEXT, _FAINT = (18, 19, 24), (232, 232, 238), (150, 152, 165)
_RIGHT, _WRONG = (72, 199, 116), (226, 88, 88)


def draw_contact_sheet(outcomes: Sequence[Outcome], target: Path) -> None:
    """Write a PNG: for each query a row for each hit, eight frames of its moment, green if right.

    Raises:
        DataError: A hit's file can no longer be decoded.
    """
    row = _FRAME + _GAP
    heights = [2 * _LINE + row * len(outcome.hits) for outcome in outcomes]
    label = 190
    width = 2 * _MARGIN + label + _FRAMES * (_FRAME + 4)
    sheet = Image.new("RGB", (width, 2 * _MARGIN + sum(heights)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    y = _MARGIN
    for outcome, height in zip(outcomes, heights, strict=True):
        draw.text((_MARGIN, y), _fitting(f"“{outcome.query}”", title, width - 2 * _MARGIN), _TEXT, font=title)
        below = y + _LINE + 6
        for hit, is_true in zip(outcome.hits, outcome.is_true, strict=True):
            colour = _RIGHT if is_true else _WRONG
            draw.rectangle((_MARGIN, below, _MARGIN + 4, below + _FRAME), fill=colour)
            said = f"{hit.rank}. {Path(hit.path).name}\n{hit.start_s:.1f} to {hit.end_s:.1f} s"
            draw.text((_MARGIN + 14, below + 6), said, _TEXT, font=small, spacing=5)
            score = f"{hit.score_kind}  {hit.score:.2f}"
            draw.text((_MARGIN + 14, below + 48), score, _FAINT, font=small)
            for number, frame in enumerate(_frames(hit)):
                picture = Image.fromarray(frame).resize((_FRAME, _FRAME), Image.Resampling.LANCZOS)
                sheet.paste(picture, (_MARGIN + label + number * (_FRAME + 4), below))
            below += row
        y += height
    sheet.save(target)


def _frames(hit: Hit) -> np.ndarray:
    """Return eight frames spread over the hit's moment, (8, h, w, 3) uint8."""
    from vlm.data.decoding import read_frames

    step = (hit.end_s - hit.start_s) / _FRAMES
    return read_frames(Path(hit.path), times_s=[hit.start_s + step * (n + 0.5) for n in range(_FRAMES)])


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    while font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
