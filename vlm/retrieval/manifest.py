"""What an index is made for, which never changes, and what it holds at one generation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm.errors import IntegrityError
from vlm.retrieval.catalog import Catalog, Generation, VideoRow
from vlm.retrieval.embedding import FeatureLayout
from vlm.retrieval.segments import Segmentation
from vlm.types import Preprocessing, VideoTextEncoder

FORMAT = "vlm-index/3"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """The model that an index belongs to; only one with this fingerprint can read its vectors."""

    source: str
    name: str
    kind: str
    domain: str
    capabilities: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What never changes in an index; the content of ``manifest.json``.

    Attributes:
        format: `FORMAT`.
        model: Whose vectors they are.
        preprocessing: How frames become its input.
        features: What is stored of a segment.
        segment_s: Longest segment, in seconds.
        stride_s: From one start to the next, within a video or a shot, in seconds.
        segmentation: Whether videos are cut evenly, or first where one shot ends and another begins.
    """

    format: str
    model: ModelIdentity
    preprocessing: Preprocessing
    features: FeatureLayout
    segment_s: float
    stride_s: float
    segmentation: Segmentation = "even"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One generation, held by a reader. Rows count the segments of all parts in order.

    Attributes:
        generation: Which.
        videos: The videos in it.
        parts: (part, first row, rows) in row order.
        row_video: (rows,) position in `videos`, or -1 where the video was removed.
        row_bounds: (rows, 2) start and end of each segment, in seconds; 0 where the video was removed.
        row_hashes: (rows, frames) uint64, what the frames of each look like; 0 where the video was removed.
    """

    generation: Generation
    videos: list[VideoRow]
    parts: list[tuple[int, int, int]]
    row_video: np.ndarray
    row_bounds: np.ndarray
    row_hashes: np.ndarray

    @cached_property
    def alive(self) -> np.ndarray:
        """(rows,) whether the segment's video is still in the index."""
        return self.row_video >= 0

    def locate(self, row: int) -> tuple[int, int]:
        """Return the part and the row within it of a row."""
        firsts = [first for _, first, _ in self.parts]
        position = int(np.searchsorted(firsts, row, side="right")) - 1
        part, first, _ = self.parts[position]
        return part, row - first


def identify(model: VideoTextEncoder, source: str | None) -> ModelIdentity:
    """Return what an index records of its model."""
    return ModelIdentity(
        source=source or model.name,
        name=model.name,
        kind=model.kind,
        domain=model.domain,
        capabilities=tuple(sorted(model.capabilities)),
        fingerprint=model.fingerprint,
    )


def load_snapshot(catalog: Catalog, generation: Generation) -> Snapshot:
    """Read what a generation holds.

    Raises:
        IntegrityError: The catalogue contradicts itself.
    """
    try:
        return _assemble(catalog, generation)
    except (ValueError, TypeError, LookupError) as error:
        raise IntegrityError(
            f"{catalog.path}: damaged ({type(error).__name__}: {error}); run vlm index verify"
        ) from error


def _assemble(catalog: Catalog, generation: Generation) -> Snapshot:
    videos = catalog.videos(generation.id)
    position = {video.row: i for i, video in enumerate(videos)}
    parts, num_rows = [], 0
    for file in catalog.files(generation.id):
        if file.name.startswith("vectors/"):
            parts.append((file.part, num_rows, file.num_rows))
            num_rows += file.num_rows
    first_of = {part: first for part, first, _ in parts}
    row_video = np.full(num_rows, -1, np.int32)
    row_bounds = np.zeros((num_rows, 2), np.float64)
    spans = catalog.spans(generation.id)
    num_frames = len(spans[0].hashes) // (8 * spans[0].num_rows) if spans else 0
    row_hashes = np.zeros((num_rows, num_frames), np.uint64)
    for span in spans:
        # a renamed video and its former self lie in the same rows
        if span.video not in position:
            continue
        bounds = np.frombuffer(span.bounds, np.float64).reshape(-1, 2)
        first = first_of[span.part] + span.first_row
        row_video[first : first + len(bounds)] = position[span.video]
        row_bounds[first : first + len(bounds)] = bounds
        row_hashes[first : first + len(bounds)] = np.frombuffer(span.hashes, np.uint64).reshape(
            len(bounds), num_frames
        )
    return Snapshot(
        generation=generation,
        videos=videos,
        parts=parts,
        row_video=row_video,
        row_bounds=row_bounds,
        row_hashes=row_hashes,
    )
