"""What stored token features cost and give when hits are reranked from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.retrieval.embedding import StoreTokens
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.searcher import Searcher
from vlm.types import VideoTextEncoder

WAYS: tuple[StoreTokens, ...] = ("none", "pooled", "full")


def measure_way(
    folder: Path,
    way: StoreTokens,
    model: VideoTextEncoder,
    files: Sequence[Path],
    texts: Sequence[tuple[str, str]],
    rerank: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Index videos with one way to keep tokens, search for texts with and without reranking.

    Args:
        folder: A new index.
        way: What is kept of each segment.
        model: Embeds and reranks.
        files: The videos.
        texts: Each a text and the file name of the video that it is about.
        rerank: Of how many segments the matching head is asked.
        options: Of `VideoIndex.add`.

    Returns:
        JSON-ready: bytes a segment and a second of footage, milliseconds of a search with and without
        reranking (median, 95th percentile), and for each text whether its video came first, both ways.
    """
    index = VideoIndex.create(folder, model, store_tokens=way)
    index.add(files, model=model, allow_narrow_model=True, **options)
    searcher = Searcher(index, model)
    plain, again = (_search(searcher, texts, count) for count in (0, rerank))
    features = index.manifest.features
    return {
        "bytes_per_segment": features.token_bytes,
        "bytes_per_s": features.token_bytes / index.manifest.stride_s,
        "tokens": [features.num_tokens, features.token_dim],
        "search_ms": plain["ms"],
        "reranked_ms": again["ms"],
        "is_first": plain["is_first"],
        "is_first_reranked": again["is_first"],
    }


def _search(searcher: Searcher, texts: Sequence[tuple[str, str]], rerank: int) -> dict[str, Any]:
    """Return for each text whether its video came first, and how long a search took, encoding included."""
    is_first, taken = [], []
    searcher.search(texts[0][0], top_k=1, rerank=rerank)
    for text, name in texts:
        begin = time.perf_counter()
        hits = searcher.search(text, top_k=1, rerank=rerank, group=False)
        taken.append(1e3 * (time.perf_counter() - begin))
        is_first.append(bool(hits) and Path(hits[0].path).name == name)
    return {
        "is_first": is_first,
        "ms": {"p50": float(np.median(taken)), "p95": float(np.quantile(taken, 0.95))},
    }
