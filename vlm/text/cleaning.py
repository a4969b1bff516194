"""The reference's rule for captions and queries: what is left of a text before it is cut into tokens."""

from __future__ import annotations

import re

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACES = re.compile(r"\s+")


def clean(text: str) -> str:
    """Lower the case, delete punctuation, open hyphens and slashes into spaces, squeeze spaces.

    >>> clean('A "red" 3, moving left-to-right!')
    'a red 3 moving left to right'
    """
    text = _DELETED.sub("", text.lower()).replace("-", " ").replace("/", " ")
    return _SPACES.sub(" ", text.replace("<person>", "person")).strip()


def join_statement(question: str, candidate: str) -> str:
    """Return the statement that the matching head judges: the question, then one of its answers."""
    return f"{question.strip()} {candidate.strip()}".strip()
