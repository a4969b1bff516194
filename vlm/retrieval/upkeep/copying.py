"""Rows from parts into a new part: what compaction and merging have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlm.retrieval.catalog import Catalog, Span
from vlm.retrieval.embedding import StoreTokens
from vlm.retrieval.vector_log import LogFile, TokenBlock, VectorLog


@dataclass(slots=True)
class Part:
    """A part of a log: its files, its rows, and the spans of it that belong to videos, in row order."""

    number: int
    num_rows: int
    files: list[LogFile] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def num_alive(self) -> int:
        """Rows that belong to a video."""
        return sum(span.num_rows for span in self.spans)

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.size_bytes for file in self.files)


def read_parts(catalog: Catalog, generation: int) -> list[Part]:
    """Return the parts of a generation in row order, with what is alive in them."""
    alive = {video.row for video in catalog.videos(generation)}
    parts: dict[int, Part] = {}
    for file in catalog.files(generation):
        parts.setdefault(file.part, Part(file.part, file.num_rows)).files.append(file)
    for span in catalog.spans(generation):
        if span.video in alive:
            parts[span.part].spans.append(span)
    return list(parts.values())


def copy_spans(
    source: VectorLog, parts: Sequence[Part], log: VectorLog, number: int, store_tokens: StoreTokens
) -> tuple[list[LogFile], list[Span]]:
    """Write the spans of some parts as one new part of a log.

    Returns:
        Its files, and the spans in it.

    Raises:
        IntegrityError: A source file is not what was written; nothing of it is copied.
        NoSpaceError: The disk is full.
    """
    source.check(file for part in parts for file in part.files)
    vectors, tokens, spans, first = [], [], [], 0
    for part in parts:
        rows = [row for span in part.spans for row in range(span.first_row, span.first_row + span.num_rows)]
        vectors.append(source.read(f"vectors/{part.number:06d}.npy", rows))
        if store_tokens != "none":
            tokens.append(source.tokens(part.number, rows, quantised=store_tokens == "pooled"))
        for span in part.spans:
            spans.append(replace(span, part=number, first_row=first))
            first += span.num_rows
    block = TokenBlock.join(tokens) if tokens else None
    return log.write_part(number, np.concatenate(vectors), block), spans
