"""Moments ranked by words, by looks, or by words and a model together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm.errors import CapabilityError
from vlm.retrieval.duplicates.alignment import liken
from vlm.retrieval.manifest import Snapshot
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.words.search import Mention, WordSearch, fuse


def rank_without_model(
    snapshot: Snapshot, words: WordSearch, encoded: EncodedQuery, allowed: np.ndarray
) -> tuple[str, list[tuple[int, float]]]:
    """Return how it was ranked, and rows with scores: what is written about, or what looks alike.

    Args:
        snapshot: What is searched.
        words: Its words.
        encoded: A text, or a picture.
        allowed: (rows,) bool, the segments that may be returned.

    Raises:
        CapabilityError: The query is neither.
    """
    if encoded.words is not None:
        return "words", [(one.row, one.score) for one in words.find(encoded.words, allowed)]
    if encoded.look is None:
        raise CapabilityError("an index without a model is searched by one text, picture, video or moment")
    likeness = liken(snapshot.row_hashes, encoded.look)
    rows = np.flatnonzero(allowed & (likeness > 0))
    best: dict[int, tuple[int, float]] = {}
    for row in rows[np.lexsort((rows, -likeness[rows]))].tolist():
        best.setdefault(int(snapshot.row_video[row]), (row, float(likeness[row])))
    return "look", list(best.values())


def fuse_moments(
    snapshot: Snapshot, seen: Sequence[int], mentions: Sequence[Mention]
) -> list[tuple[int, float]]:
    """Return rows with the fused scores of their videos, the best first.

    The moment is the model's, unless subtitles tell another and rank the video higher.

    Args:
        snapshot: What the rows are of.
        seen: Rows that the model ranks, one of each video, the best first.
        mentions: What the words rank, the same way.
    """
    owners = snapshot.row_video
    places = {int(owners[row]): place for place, row in enumerate(seen)}
    row_of = {int(owners[row]): row for row in seen}
    for place, one in enumerate(mentions):
        video = int(owners[one.row])
        if video not in places or (one.is_timed and place < places[video]):
            row_of[video] = one.row
    ranking = [int(owners[one.row]) for one in mentions]
    return [(row_of[video], score) for video, score in fuse([list(places), ranking])]
