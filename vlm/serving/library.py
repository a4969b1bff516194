"""What is served now: one generation of the index, its videos by identifier, and their files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import DataError
from vlm.retrieval.catalog import Catalog, VideoRow
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.searcher import Searcher
from vlm.retrieval.strength import TextBank
from vlm.serving.batching import BatchingBackend
from vlm.serving.transport.problems import NotFound, Problem
from vlm.types import VideoTextEncoder

_CATALOG = "catalog.sqlite"


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One generation, never changed: a request works with one of these from its beginning to its end.

    Attributes:
        searcher: Searches this generation.
        generation: Its number.
        videos: By identifier.
        roots: The files and folders that were ever indexed; no file outside them is served.
    """

    searcher: Searcher
    generation: int
    videos: dict[str, VideoRow]
    roots: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, model: VideoTextEncoder, backend: str, bank: TextBank) -> Library:
        """Open the newest generation of an index."""
        index = VideoIndex.open(folder)
        searcher = Searcher(index, model, backend=backend, around=BatchingBackend, bank=bank)
        with Catalog.open(folder / _CATALOG) as catalog:
            roots = tuple(Path(os.path.realpath(os.fsdecode(root))) for root in catalog.roots())
        snapshot = searcher.index.snapshot
        return cls(
            searcher=searcher,
            generation=snapshot.generation.id,
            videos={video.video_id: video for video in snapshot.videos},
            roots=roots,
        )

    def is_newest(self) -> bool:
        """Whether nothing was committed since."""
        with Catalog.open(self.searcher.index.folder / _CATALOG) as catalog:
            return catalog.latest().id == self.generation

    def video(self, video_id: str) -> VideoRow:
        """Return a video.

        Raises:
            NotFound: The index holds none of that identifier.
        """
        found = self.videos.get(video_id)
        if found is None:
            raise NotFound("video")
        return found

    def path(self, video_id: str) -> Path:
        """Return where a video's file lies, all links followed, after checking that it may be served.

        Raises:
            NotFound: No such video, or its file is gone or leads out of what was indexed.
            Problem: The file has another size than when it was indexed (409).
        """
        descriptor, path = self.open_file(video_id)
        os.close(descriptor)
        return path

    def open_file(self, video_id: str) -> tuple[int, Path]:
        """Return a video's file, open for reading, and where it truly lies; the caller closes it.

        Raises:
            NotFound: See `path`.
            Problem: See `path`.
        """
        video = self.video(video_id)
        path = Path(os.path.realpath(os.fsdecode(video.path)))
        if not any(path == root or path.is_relative_to(root) for root in self.roots):
            raise NotFound("file any more")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound("file any more") from error
        try:
            found = os.fstat(descriptor)
            # a folder on the way may have become a link between the two calls
            if not stat.S_ISREG(found.st_mode) or os.path.realpath(f"/proc/self/fd/{descriptor}") not in (
                str(path),
                f"/proc/self/fd/{descriptor}",
            ):
                raise NotFound("file any more")
            if found.st_size != video.size_bytes:
                raise Problem(409, "changed", "the file changed since it was indexed; update the index")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, path


def without_paths(error: DataError, path: Path, name: str) -> DataError:
    """Return the error with a file's place on this machine replaced by what the client calls it."""
    return DataError(str(error).replace(str(path), name), error.reason)
