"""The rows of a catalogue, and what one generation changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm.retrieval.vector_log import LogFile


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRow:
    """An indexed video.

    `row` is its key in this catalogue, `video_id` its name to the world, `tags` its container's as JSON.
    """

    row: int
    video_id: str
    path: bytes
    size_bytes: int
    sha256: str
    duration_s: float
    width: int
    height: int
    codec: str
    domain: str
    num_segments: int
    tags: str = "{}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive segments of a video in one part, from `first_row`.

    Attributes:
        video: Key of the video.
        part: Number of the part.
        first_row: Row of the first of them in the part.
        bounds: float64 (n, 2), start and end in seconds.
        hashes: uint64 (n, frames), what each frame looks like (`vlm.retrieval.duplicates.hashing`).
    """

    video: int
    part: int
    first_row: int
    bounds: bytes
    hashes: bytes

    @property
    def num_rows(self) -> int:
        """How many segments."""
        return len(self.bounds) // 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A file that could not be indexed: a short countable reason, and the sentence behind it."""

    path: bytes
    reason: str
    detail: str
    row: int = 0


@dataclass(kw_only=True, slots=True)
class Changes:
    """What one generation adds; `spans` and `removed_*` refer to keys."""

    files: list[LogFile] = field(default_factory=list)
    videos: list[VideoRow] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    removed_videos: list[int] = field(default_factory=list)
    removed_rejections: list[int] = field(default_factory=list)
    removed_roots: list[int] = field(default_factory=list)
    roots: list[bytes] = field(default_factory=list)
    seen: list[tuple[bytes, int, int, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        added = self.videos or self.rejected or self.roots or self.seen
        return bool(added or self.removed_videos or self.removed_rejections or self.removed_roots)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One committed state of the index."""

    id: int
    num_videos: int
    num_segments: int
    num_rejected: int
    digest: str
