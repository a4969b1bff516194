"""What is served now: one generation of the index, its videos by identifier, and their files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import DataError
from vlm.retrieval.catalog import VideoRow
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.retrieval.rerank import OnModel
from vlm.retrieval.searcher import Searcher
from vlm.retrieval.store.searcher import StoreSearcher
from vlm.retrieval.strength import TextBank
from vlm.serving.batching import BatchingBackend
from vlm.serving.transport.problems import NotFound, Problem
from vlm.types import VideoTextEncoder

# the backend that searches a published store, where others search an index folder
LANCE = "lance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One generation, never changed: a request works with one of these from its beginning to its end.

    Attributes:
        searcher: Searches this generation.
        generation: Its number.
        videos: By identifier.
        roots: The files and folders that were ever indexed; no file outside them is served.
    """

    searcher: SnapshotSearcher
    generation: int
    videos: dict[str, VideoRow]
    roots: tuple[Path, ...]

    @classmethod
    def open(
        cls, place: Path | str, model: VideoTextEncoder, backend: str, bank: TextBank, on_model: OnModel
    ) -> Library:
        """Open the newest generation of an index, or of a store if the backend is ``lance``."""
        if backend == LANCE:
            # a store is asked about each query by itself: nothing is won by waiting for others
            return cls._of(StoreSearcher(str(place), model, bank=bank))
        index = VideoIndex.open(place)
        searcher = Searcher(
            index, model, backend=backend, around=BatchingBackend, bank=bank, on_model=on_model
        )
        return cls._of(searcher)

    def newest(self) -> Library | None:
        """Return the newest generation; None if all is to be opened again, see `SnapshotSearcher.newest`."""
        searcher = self.searcher.newest()
        return None if searcher is None else self._of(searcher)

    @property
    def is_outgrown(self) -> bool:
        """Whether `renewed` is due."""
        return isinstance(self.searcher, Searcher) and self.searcher.is_outgrown

    def renewed(self) -> Library:
        """Return the same generation with its search structure made anew; that takes up to minutes."""
        assert isinstance(self.searcher, Searcher)
        searcher = self.searcher.fork()
        searcher.renew()
        return self._of(searcher)

    @classmethod
    def _of(cls, searcher: SnapshotSearcher) -> Library:
        return cls(
            searcher=searcher,
            generation=searcher.snapshot.generation.id,
            videos={video.video_id: video for video in searcher.snapshot.videos},
            roots=searcher.index.roots(),
        )

    @property
    def decodes_to_rerank(self) -> bool:
        """Whether reranking reads the videos' files."""
        searcher = self.searcher
        if not isinstance(searcher, Searcher) or "rerank" not in searcher.capabilities:
            return False
        return not searcher.stores_tokens

    @property
    def is_store(self) -> bool:
        """Whether this is a published store, without the index."""
        return isinstance(self.searcher, StoreSearcher)

    def is_newest(self) -> bool:
        """Whether nothing was committed or published since."""
        return self.searcher.index.is_newest()

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
