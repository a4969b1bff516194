"""What an index is made for, which never changes, and what it holds at one generation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm.errors import IntegrityError, InvalidInput
from vlm.retrieval.catalog import Catalog, Generation, Span, VideoRow
from vlm.retrieval.embedding import FeatureLayout
from vlm.retrieval.segments import Segmentation
from vlm.retrieval.vector_log import LogFile
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
        grid_step_s: Seconds between the frames of a video that segments share; None if each has its own, as
            all have in an index that does not say.
    """

    format: str
    model: ModelIdentity
    preprocessing: Preprocessing
    features: FeatureLayout
    segment_s: float
    stride_s: float
    segmentation: Segmentation = "even"
    grid_step_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One generation, held by a reader. Rows count the segments of all parts in order.

    Attributes:
        generation: Which.
        videos: The videos in it.
        files: Those of the vector log.
        parts: (part, first row, rows) in row order.
        row_video: (rows,) position in `videos`, or -1 where the video was removed.
        row_bounds: (rows, 2) start and end of each segment, in seconds; 0 where the video was removed.
        row_hashes: (rows, frames) uint64, what the frames of each look like; 0 where the video was removed.
    """

    generation: Generation
    videos: list[VideoRow]
    files: tuple[LogFile, ...]
    parts: list[tuple[int, int, int]]
    row_video: np.ndarray
    row_bounds: np.ndarray
    row_hashes: np.ndarray

    @cached_property
    def alive(self) -> np.ndarray:
        """(rows,) whether the segment's video is still in the index."""
        return self.row_video >= 0

    @cached_property
    def places(self) -> dict[str, int]:
        """Position in `videos` by identifier."""
        return {video.video_id: place for place, video in enumerate(self.videos)}

    @cached_property
    def keys(self) -> np.ndarray:
        """(videos,) the catalogue's keys."""
        return np.array([video.row for video in self.videos], np.int64)

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


class Facts(Protocol):
    """What a catalogue tells of a generation.

    Attributes:
        path: Where it lies.
    """

    path: Path

    def videos(self, generation: int) -> list[VideoRow]:
        """Return the videos, in the order they came."""

    def spans(self, generation: int) -> list[Span]:
        """Return where segments lie, by part and row."""

    def files(self, generation: int) -> list[LogFile]:
        """Return the files of the vector log, in the order they were written."""


class IndexReader(Protocol):
    """An index folder or a published store, held at one generation."""

    folder: Path
    manifest: Manifest

    @property
    def snapshot(self) -> Snapshot:
        """The generation that is held."""

    def is_newest(self) -> bool:
        """Whether nothing came since."""

    def roots(self) -> tuple[Path, ...]:
        """Return the files and folders that were ever indexed, all links followed."""

    def info(self) -> dict[str, Any]:
        """Return counts, and what it was made with and for; JSON-ready."""


def check_model(manifest: Manifest, model: VideoTextEncoder, place: Path | str) -> None:
    """Raise InvalidInput unless `model` is the one that made the vectors at a place."""
    mine = manifest.model
    if model.fingerprint != mine.fingerprint or model.preprocessing != manifest.preprocessing:
        raise InvalidInput(
            f"{place} was made by model {mine.name!r} ({mine.fingerprint[:12]}), but the model at "
            f"hand is {model.name!r} ({model.fingerprint[:12]}): their vectors cannot be compared. Use "
            f"--model {mine.source}, or build a new index: vlm index build PATH --out NEW --model MODEL"
        )


def describe(manifest: Manifest, snapshot: Snapshot) -> dict[str, Any]:
    """Return what an index and a store say alike of themselves; JSON-ready."""
    generation, model = snapshot.generation, manifest.model
    return {
        "generation": generation.id,
        "num_videos": generation.num_videos,
        "num_segments": generation.num_segments,
        "num_rejected": generation.num_rejected,
        "duration_s": sum(video.duration_s for video in snapshot.videos),
        "model": model.source,
        "model_name": model.name,
        "model_domain": model.domain,
        "model_fingerprint": model.fingerprint,
        "segment_s": manifest.segment_s,
        "stride_s": manifest.stride_s,
        "segmentation": manifest.segmentation,
        "grid_step_s": manifest.grid_step_s,
        "dim": manifest.features.dim,
    }


def load_snapshot(facts: Facts, generation: Generation) -> Snapshot:
    """Read what a generation holds.

    Raises:
        IntegrityError: The catalogue contradicts itself.
    """
    with _damage(facts.path):
        number = generation.id
        found = _assemble(
            _NOTHING, generation, facts.videos(number), facts.spans(number), facts.files(number), set()
        )
        assert found is not None
        return found


def go_on(catalog: Catalog, generation: Generation, known: Snapshot) -> Snapshot:
    """Read what a generation holds; unless an earlier one was compacted away, only what is new since.

    Args:
        catalog: In one state from the first reading to the last (`Catalog.query`, ``BEGIN``).
        generation: Which.
        known: The earlier one.

    Raises:
        IntegrityError: The catalogue contradicts itself.
    """
    number, since, found = generation.id, known.generation.id, None
    with _damage(catalog.path):
        if 0 < since <= number and catalog.holds(known.generation):
            found = _assemble(
                known,
                generation,
                catalog.videos(number, since),
                catalog.spans(number, since),
                catalog.files(number, since),
                set(catalog.removed_videos(number, since)),
            )
    return load_snapshot(catalog, generation) if found is None else found


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        raise IntegrityError(
            f"{path}: damaged ({type(error).__name__}: {error}); run vlm index verify"
        ) from error


def _assemble(
    known: Snapshot,
    generation: Generation,
    new: list[VideoRow],
    spans: list[Span],
    files: list[LogFile],
    removed: set[int],
) -> Snapshot | None:
    """Return a snapshot with what came and went after another; None if older videos changed their place."""
    is_kept = ~np.isin(known.keys, list(removed))
    videos = [*itertools.compress(known.videos, is_kept.tolist()), *new]
    position = {video.row: place for place, video in enumerate(new, int(is_kept.sum()))}
    if known is not _NOTHING and not {span.video for span in spans} <= position.keys() | removed:
        return None
    parts, num_rows = list(known.parts), len(known.row_video)
    for file in files:
        if file.name.startswith("vectors/"):
            parts.append((file.part, num_rows, file.num_rows))
            num_rows += file.num_rows
    first_of = {part: first for part, first, _ in parts}
    row_video = np.full(num_rows, -1, np.int32)
    # the last one is for rows of no video, whose place is -1
    places = np.append(np.where(is_kept, np.cumsum(is_kept) - 1, -1), -1)
    row_video[: len(known.row_video)] = places[known.row_video]
    is_there = (row_video >= 0)[: len(known.row_video), None]
    row_bounds = np.zeros((num_rows, 2), np.float64)
    row_bounds[: len(known.row_video)] = known.row_bounds * is_there
    num_frames = known.row_hashes.shape[1]
    if not num_frames and spans:
        num_frames = len(spans[0].hashes) // (8 * spans[0].num_rows)
    row_hashes = np.zeros((num_rows, num_frames), np.uint64)
    row_hashes[: len(known.row_video), : known.row_hashes.shape[1]] = known.row_hashes * is_there
    for span in spans:
        # a renamed video and its former self lie in the same rows
        if span.video not in position:
            continue
        bounds = np.frombuffer(span.bounds, np.float64).reshape(-1, 2)
        rows = slice(first := first_of[span.part] + span.first_row, first + len(bounds))
        row_video[rows], row_bounds[rows] = position[span.video], bounds
        row_hashes[rows] = np.frombuffer(span.hashes, np.uint64).reshape(len(bounds), num_frames)
    return Snapshot(
        generation=generation,
        videos=videos,
        files=(*known.files, *files),
        parts=parts,
        row_video=row_video,
        row_bounds=row_bounds,
        row_hashes=row_hashes,
    )


_NOTHING = Snapshot(
    generation=Generation(id=0, num_videos=0, num_segments=0, num_rejected=0, digest=""),
    videos=[],
    files=(),
    parts=[],
    row_video=np.zeros(0, np.int32),
    row_bounds=np.zeros((0, 2)),
    row_hashes=np.zeros((0, 0), np.uint64),
)
