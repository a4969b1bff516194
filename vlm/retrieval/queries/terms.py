"""Sums of queries as words of a command line: ``0.5*image:sea.jpg``, ``text:a dog``, ``like:VIDEO@12.5``."""

from __future__ import annotations

import re
from pathlib import Path

from vlm.errors import InvalidInput
from vlm.retrieval.queries.values import Moment, Part

_TERM = re.compile(
    r"(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\*)?(?P<kind>text|image|video|like):(?P<value>.+)", re.DOTALL
)

# a kind that is none: as a text it would be searched for without a word of warning
_LIKE_A_KIND = re.compile(r"[^\s:]+:\S")


def parse_term(term: str, sign: float = 1.0) -> Part:
    """Return what a term stands for; one that names no kind is a text.

    Args:
        term: Such as ``0.5*image:beach.jpg``; the kinds are ``text``, ``image``, ``video`` and ``like``.
        sign: -1 takes it away.

    Raises:
        InvalidInput: The term is empty, or its weight or moment cannot be read.
    """
    match = _TERM.fullmatch(term)
    if match is None:
        if not term.strip():
            raise InvalidInput("a term of a sum is empty; expected for example image:beach.jpg")
        if _LIKE_A_KIND.match(term):
            raise InvalidInput(
                f"expected a term such as image:beach.jpg or 0.5*text:a dog (text, image, video, like), got "
                f"{term!r}; for these very words, text:{term}"
            )
        return Part(term, sign)
    weight, kind, value = match.groups()
    if kind == "like":
        return Part(parse_moment(value), sign * float(weight or 1))
    return Part(value if kind == "text" else Path(value), sign * float(weight or 1))


def parse_moment(text: str) -> Moment:
    """Return the moment that ``VIDEO@SECONDS`` names.

    Raises:
        InvalidInput: It is no such name.
    """
    video_id, at, seconds = text.rpartition("@")
    try:
        start_s = float(seconds)
    except ValueError:
        at = ""
    if not at or not video_id:
        raise InvalidInput(f"expected a moment as VIDEO@SECONDS, such as 3f2a90c1d4e5@12.5, got {text!r}")
    return Moment(video_id, start_s)
