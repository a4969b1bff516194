"""Frames of the videos that a page's examples name, as small pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.decoding import open_video
from vlm.data.frame_sampling import middle_frames
from vlm.errors import DataError
from vlm.evaluation.card import Card

_FRAMES, _HEIGHT, _GAP = 5, 80, 2


def example_pictures(card: Card, paths: Mapping[str, Path]) -> dict[str, str]:
    """Return name → ``data:`` URL of a strip of frames for every item that the card's examples name.

    Args:
        card: A card.
        paths: Name of an item → its video; an item without one, or whose video can no longer be read, has no
            picture.
    """
    examples = card.get("examples", {})
    entries = [*examples.get("worst", []), *examples.get("best", [])]
    names = dict.fromkeys(entry[which]["name"] for entry in entries for which in ("right", "first"))
    found = {}
    for name in names:
        try:
            found[name] = _strip(paths[name])
        except (KeyError, DataError):
            continue
    return found


def _strip(path: Path) -> str:
    """Return frames of a video from left to right, a JPEG as ``data:`` URL."""
    with open_video(path) as video:
        frames = video.read(np.unique(middle_frames(video.info.num_frames, _FRAMES)))
    height, width = frames.shape[1:3]
    size = (max(1, round(width * _HEIGHT / height)), _HEIGHT)
    strip = Image.new("RGB", (len(frames) * (size[0] + _GAP) - _GAP, _HEIGHT), (128, 128, 128))
    for place, frame in enumerate(frames):
        strip.paste(
            Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC), (place * (size[0] + _GAP), 0)
        )
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
