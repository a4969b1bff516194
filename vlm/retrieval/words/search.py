"""Full-text search over what is written about the videos of one generation, in memory (SQLite FTS5)."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm.retrieval.manifest import Snapshot
from vlm.retrieval.words.gathering import passages_of

# the constant of reciprocal rank fusion: Cormack et al. 2009
_RANK_OFFSET = 60
_IDLE = frozenset(
    ("a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "that")
    + ("the", "this", "to", "with")
)
_MAX_WORDS = 64
# the kind of the model of an index that has none
NO_MODEL = "none"


@dataclass(frozen=True, slots=True)
class Mention:
    """A segment whose video is written about.

    Attributes:
        row: Which.
        score: How well the words fit; higher is better.
        is_timed: Whether the words belong to this moment, not to the whole video.
    """

    row: int
    score: float
    is_timed: bool


class WordSearch:
    """Searches the words of a snapshot's videos; they are gathered when first asked for.

    Args:
        snapshot: The generation.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def find(self, text: str, allowed: np.ndarray) -> list[Mention]:
        """Return the videos that any word of a text is written about, the best first, one segment each.

        Args:
            text: What was typed; its words are looked for, it has no syntax.
            allowed: (rows,) bool, the segments that may be returned.
        """
        words = re.findall(r"\w+", text.lower())[:_MAX_WORDS]
        telling = [word for word in words if word not in _IDLE] or words
        if not telling:
            return []
        # quoted, a word is nothing but a word
        query = " OR ".join(f'"{word}"' for word in dict.fromkeys(telling))
        with self._lock:
            found = self._opened().execute(
                "SELECT video, start_s, -bm25(passages) AS score FROM passages WHERE passages MATCH ? "
                "ORDER BY score DESC, rowid",
                (query,),
            )
            rows = found.fetchall()
        best: dict[int, Mention] = {}
        for video, start_s, score in rows:
            if video not in best and (row := self._row_of(video, start_s, allowed)) is not None:
                best[video] = Mention(row, float(score), start_s is not None)
        return list(best.values())

    @cached_property
    def _rows(self) -> np.ndarray:
        """All rows, put in order by their videos: those of video i lie between bounds i and i + 1."""
        return np.argsort(self._snapshot.row_video, kind="stable")

    @cached_property
    def _bounds(self) -> np.ndarray:
        owners = self._snapshot.row_video[self._rows]
        return np.searchsorted(owners, np.arange(len(self._snapshot.videos) + 1))

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            connection.execute(
                "CREATE VIRTUAL TABLE passages USING fts5(text, video UNINDEXED, start_s UNINDEXED, "
                "tokenize = 'porter unicode61 remove_diacritics 2')"
            )
            listings: dict[Path, list[str]] = {}
            for place, video in enumerate(self._snapshot.videos):
                # half a character, as cut titles end in, has no bytes in UTF-8
                texts = (
                    (one, one.text.encode("utf-8", "replace").decode())
                    for one in passages_of(video, listings)
                )
                values = ((text, place, one.start_s) for one, text in texts)
                connection.executemany("INSERT INTO passages VALUES (?, ?, ?)", values)
            self._connection = connection
        return self._connection

    def _row_of(self, video: int, start_s: float | None, allowed: np.ndarray) -> int | None:
        """Return the segment of a video in whose middle a time lies best; its first without a time."""
        rows = self._rows[self._bounds[video] : self._bounds[video + 1]]
        rows = rows[allowed[rows]]
        if not len(rows):
            return None
        bounds = self._snapshot.row_bounds[rows]
        if start_s is None:
            return int(rows[np.argmin(bounds[:, 0])])
        return int(rows[np.argmin(np.abs(bounds.mean(axis=1) - start_s))])


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Return what several rankings hold, with the sum of 1 / (60 + rank), the highest first.

    Source: Cormack et al. 2009, Reciprocal rank fusion outperforms Condorcet and individual rank learning.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (_RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
