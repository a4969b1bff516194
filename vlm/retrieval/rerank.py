"""Segments scored again by the matching head, from stored token features or, without them, from the files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from vlm.errors import IntegrityError
from vlm.retrieval.embedding import FeatureLayout, encode_segments
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings
from vlm.retrieval.ingest.pool import decode_files
from vlm.types import TextFeatures, VideoTextEncoder

_PAIRS_AT_ONCE = 32
_Result = TypeVar("_Result")


class OnModel(Protocol):
    """Runs what needs the model, in whatever thread that may be done."""

    def __call__(self, work: Callable[[], _Result], /) -> _Result:
        """Return what the work returns."""


def here(work: Callable[[], _Result]) -> _Result:
    """Run what needs the model at once."""
    return work()


def match_rows(
    index: VideoIndex,
    model: VideoTextEncoder,
    text: TextFeatures,
    rows: Sequence[int],
    on_model: OnModel = here,
) -> dict[int, float]:
    """Score segments against one text with the matching head.

    Args:
        index: Holds the segments.
        model: Its model; must be able to rerank.
        text: One encoded text.
        rows: Rows of the index's snapshot.
        on_model: Runs what needs the model; files are read and decoded outside of it.

    Returns:
        The log-odds of "match" by row. Rows are missing whose tokens are not stored and whose file cannot be
        read any more.
    """
    scores: dict[int, float] = {}
    stored = index.manifest.features.store_tokens != "none"
    groups = _stored_tokens(index, rows) if stored else _encoded_tokens(index, model, rows, on_model)
    for group, tokens in groups:
        for first in range(0, len(group), _PAIRS_AT_ONCE):
            part = slice(first, first + _PAIRS_AT_ONCE)
            odds = on_model(partial(_match, model, text, tokens[part]))
            scores.update(zip(group[part], odds, strict=True))
    return scores


def _stored_tokens(index: VideoIndex, rows: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    by_part: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        part, row_in_part = index.snapshot.locate(row)
        by_part[part].append((row, row_in_part))
    is_quantised = index.manifest.features.store_tokens == "pooled"
    for part, members in sorted(by_part.items()):
        group = [row for row, _ in members]
        try:
            tokens = index.log.tokens(part, [inner for _, inner in members], is_quantised)
        except IntegrityError:
            index.check_held()
            raise
        yield group, tokens.restore()


def _encoded_tokens(
    index: VideoIndex, model: VideoTextEncoder, rows: Sequence[int], on_model: OnModel
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Decode and encode the segments again, one file after the other."""
    snapshot = index.snapshot
    by_video: dict[int, list[int]] = defaultdict(list)
    for row in sorted(rows):
        by_video[int(snapshot.row_video[row])].append(row)
    videos = sorted(by_video)
    paths = [Path(os.fsdecode(snapshot.videos[video].path)) for video in videos]
    bounds = [[(float(a), float(b)) for a, b in snapshot.row_bounds[by_video[video]]] for video in videos]
    layout = FeatureLayout(
        dim=index.manifest.features.dim, store_tokens="full", token_pool=1, num_tokens=0, token_dim=0
    )
    settings = DecodeSettings(preprocessing=index.manifest.preprocessing)
    with closing(decode_files(paths, settings, bounds)) as events:
        for event in events:
            if isinstance(event, DecodedSegment):
                _, tokens = on_model(partial(encode_segments, model, [event.video], layout))
                assert tokens is not None
                yield [by_video[videos[event.file]][event.number]], tokens.restore()


def _match(model: VideoTextEncoder, text: TextFeatures, tokens: np.ndarray) -> list[float]:
    import torch

    with torch.inference_mode():
        video_tokens = torch.from_numpy(tokens).to(device=text.tokens.device, dtype=text.tokens.dtype)
        count = len(tokens)
        logits = model.match(video_tokens, text.tokens.expand(count, -1, -1), text.mask.expand(count, -1))
        odds = (logits[:, 1] - logits[:, 0]).float().cpu()
    return [float(value) for value in odds]
