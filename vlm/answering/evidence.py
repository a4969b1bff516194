"""Which moment of which video a question is about, and its frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm.errors import InvalidInput
from vlm.retrieval.ingest.events import DecodeSettings
from vlm.retrieval.ingest.pool import decode_one
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.types import Hit

_RERANKED = 32


def find_evidence(
    searcher: SnapshotSearcher, statements: Sequence[str | EncodedQuery], *, video: str | None = None
) -> Hit:
    """Return the segment that fits any of the statements best, by the matching head if it can be asked.

    Args:
        searcher: The index and its model.
        statements: What the answers claim, as texts or as the searcher encoded them.
        video: Identifier of the only video to look at, or None for all.

    Raises:
        InvalidInput: The index is empty, or holds no such video.
    """
    where = None if video is None else f"video_id = '{_quoted(video)}'"
    rerank = _RERANKED if "rerank" in searcher.capabilities else 0
    found = [
        hit
        for statement in statements
        for hit in searcher.search(statement, top_k=1, rerank=rerank, where=where)
    ]
    if not found:
        if video is not None and video not in searcher.snapshot.places:
            raise InvalidInput(
                f"the index holds no video {video!r}; vlm index info --videos lists the identifiers"
            )
        is_empty = not searcher.snapshot.videos
        raise InvalidInput(
            "the index holds no videos" if is_empty else "nothing was found that may answer this"
        )
    return max(found, key=lambda hit: hit.score)


def decode_evidence(searcher: SnapshotSearcher, hit: Hit) -> np.ndarray:
    """Return a hit's frames (t, 3, h, w) float32, prepared as the index prepared them.

    Raises:
        DataError: The file is gone or can no longer be decoded.
    """
    settings = DecodeSettings(preprocessing=searcher.index.manifest.preprocessing)
    return decode_one(Path(hit.path), settings, [(hit.start_s, hit.end_s)])


def _quoted(text: str) -> str:
    return text.replace("'", "''")
