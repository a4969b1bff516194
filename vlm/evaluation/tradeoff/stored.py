"""A real index folder full of made-up vectors: the same catalogue, log and parts that ingesting leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlm.evaluation.tradeoff.synthetic import BLOCK_ROWS, SEGMENTS_PER_VIDEO, Floats, SyntheticVectors
from vlm.retrieval.catalog.rows import Changes, Span, VideoRow
from vlm.retrieval.duplicates.hashing import NO_HASH
from vlm.retrieval.embedding import FeatureLayout
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.manifest import FORMAT, Manifest, identify
from vlm.types import Preprocessing

SEGMENT_S, STRIDE_S = 8.0, 4.0
# ingesting writes parts of this many segments at most
PART_ROWS = 500
_CALIBRATION_SEED = 1


class SyntheticModel:
    """What an index of made-up vectors belongs to: it embeds any text as one about a stored video."""

    name, kind, domain, fingerprint = "synthetic", "video-text", "open", "synthetic-vectors-1"
    capabilities = frozenset({"search"})
    device = "cpu"
    preprocessing = Preprocessing()

    def __init__(self, vectors: SyntheticVectors, num_rows: int) -> None:
        self._vectors, self._num_rows, self._num_texts = vectors, num_rows, 0

    def encode_text(self, texts: list[str]) -> Any:
        """Return new embeddings (texts, dim), whatever the texts say."""
        import torch

        self._num_texts += 1
        seed = _CALIBRATION_SEED + self._num_texts
        rows = self._vectors.texts(len(texts), self._num_rows, seed=seed)
        return SimpleNamespace(embedding=torch.from_numpy(rows))


def store(folder: Path, vectors: SyntheticVectors, num_rows: int) -> VideoIndex:
    """Make an index folder of the first `num_rows` vectors, or open the one that is there.

    Args:
        folder: Where; an unfinished one goes on.
        vectors: What is stored, as float16.
        num_rows: How many.
    """
    if (folder / "manifest.json").exists():
        index = VideoIndex.open(folder)
    else:
        model: Any = SyntheticModel(vectors, num_rows)
        layout = FeatureLayout(dim=vectors.dim, store_tokens="none", token_pool=1, num_tokens=0, token_dim=0)
        manifest = Manifest(
            format=FORMAT, model=identify(model, None), preprocessing=model.preprocessing,
            features=layout, segment_s=SEGMENT_S, stride_s=STRIDE_S,
        )  # fmt: skip
        index = VideoIndex.create_for(folder, manifest)
    done = len(index.snapshot.row_video)
    if done < num_rows:
        with index.writing() as catalog:
            for number, block in enumerate(vectors.blocks(num_rows)):
                if number * BLOCK_ROWS >= done:
                    catalog.commit(_changes(index, block, number * BLOCK_ROWS, catalog.next_part()))
        index.refresh()
    return index


def _changes(index: VideoIndex, block: Floats, first_row: int, part: int) -> Changes:
    changes = Changes()
    for at in range(0, len(block), PART_ROWS):
        rows = block[at : at + PART_ROWS].astype(np.float16)
        changes.files += index.log.write_part(part, rows, None)
        for start in range(0, len(rows), SEGMENTS_PER_VIDEO):
            count = min(SEGMENTS_PER_VIDEO, len(rows) - start)
            starts = STRIDE_S * np.arange(count)
            row = 1 + (first_row + at + start) // SEGMENTS_PER_VIDEO
            changes.videos.append(
                VideoRow(
                    row=row,
                    video_id=f"video-{row:07d}",
                    path=f"/videos/{row:07d}.mp4".encode(),
                    size_bytes=1_000_000,
                    sha256="",
                    duration_s=float(starts[-1] + SEGMENT_S),
                    width=640,
                    height=360,
                    codec="h264",
                    domain="open",
                    num_segments=count,
                )  # fmt: skip
            )
            bounds = np.stack([starts, starts + SEGMENT_S], axis=1).astype(np.float64)
            # without hashes no two videos are taken for copies of the same footage
            hashes = np.full((count, 1), NO_HASH, np.uint64)
            span = Span(
                video=row, part=part, first_row=start, bounds=bounds.tobytes(), hashes=hashes.tobytes()
            )
            changes.spans.append(span)
        part += 1
    return changes
