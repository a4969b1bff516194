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
from vlm.retrieval.vector_log import VectorLog
from vlm.types import Preprocessing

SEGMENT_S, STRIDE_S = 8.0, 4.0
# ingesting writes parts of this many segments at most
PART_ROWS = 500
_CALIBRATION_SEED, _HASH_SEED = 1, 4


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


def store(
    folder: Path,
    vectors: SyntheticVectors,
    num_rows: int,
    segments_per_video: int = SEGMENTS_PER_VIDEO,
    num_frames: int = 0,
) -> VideoIndex:
    """Make an index folder of the first `num_rows` vectors, or open the one that is there.

    Args:
        folder: Where; an unfinished one goes on.
        vectors: What is stored, as float16.
        num_rows: How many.
        segments_per_video: How many of them are one video; divides `PART_ROWS`.
        num_frames: Hashed frames of a segment, no two of them alike; without any, none is compared.
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
                    first = number * BLOCK_ROWS
                    shape = segments_per_video, num_frames
                    catalog.commit(changes_of(index.log, block, first, catalog.next_part(), shape))
        index.refresh()
    return index


def changes_of(log: VectorLog, block: Floats, first_row: int, part: int, shape: tuple[int, int]) -> Changes:
    """Write vectors as parts of a log, and return what a catalogue has to commit.

    Args:
        log: Of the index.
        block: (rows, dim), rounded to float16.
        first_row: Rows of videos that the index ever held; a multiple of a video's.
        part: Number of the first part.
        shape: Segments of a video, which divide `PART_ROWS`, and hashed frames of a segment; see `store`.
    """
    changes, (segments_per_video, num_frames) = Changes(), shape
    random = np.random.default_rng([_HASH_SEED, first_row])
    for at in range(0, len(block), PART_ROWS):
        rows = block[at : at + PART_ROWS].astype(np.float16)
        changes.files += log.write_part(part, rows, None)
        for start in range(0, len(rows), segments_per_video):
            count = min(segments_per_video, len(rows) - start)
            starts = STRIDE_S * np.arange(count)
            row = 1 + (first_row + at + start) // segments_per_video
            changes.videos.append(
                VideoRow(
                    row=row,
                    video_id=f"video-{row:07d}",
                    path=f"/videos/{row:07d}.mp4".encode(),
                    size_bytes=1_000_000,
                    sha256=f"{row:064x}",
                    duration_s=float(starts[-1] + SEGMENT_S),
                    width=640,
                    height=360,
                    codec="h264",
                    domain="open",
                    num_segments=count,
                )  # fmt: skip
            )
            bounds = np.stack([starts, starts + SEGMENT_S], axis=1).astype(np.float64)
            hashes = random.integers(1, 2**64, (count, num_frames), np.uint64)
            if not num_frames:
                hashes = np.full((count, 1), NO_HASH, np.uint64)
            path, sha256 = changes.videos[-1].path, changes.videos[-1].sha256
            changes.seen.append((path, 1_000_000, row, sha256))
            span = Span(
                video=row, part=part, first_row=start, bounds=bounds.tobytes(), hashes=hashes.tobytes()
            )
            changes.spans.append(span)
        part += 1
    return changes
