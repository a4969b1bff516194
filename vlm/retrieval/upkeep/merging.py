"""Several indexes into one: their vectors are copied, nothing is embedded again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm.crashes import crash_point
from vlm.errors import IntegrityError, InvalidInput
from vlm.progress import track
from vlm.retrieval.catalog import Catalog, Changes, Rejection, Span, VideoRow
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.scanning import assign_video_id
from vlm.retrieval.reports import Report
from vlm.retrieval.upkeep.copying import Part, copy_spans, read_parts
from vlm.retrieval.vector_log import LogFile


def merge(sources: Sequence[Path | str], out: Path | str) -> Report:
    """Put what several indexes hold into one.

    A video whose content is there already is not added again. Where two indexes hold one path with different
    contents, the first wins and the other is listed as rejected. Run it again after an interruption and it
    continues.

    Args:
        sources: Index folders; they are only read.
        out: An index folder; made if it is not there.

    Raises:
        InvalidInput: They were not made by one model with one preprocessing and one way of cutting.
        IntegrityError: One of them is damaged.
    """
    started, place = time.monotonic(), Path(os.path.abspath(out))
    indexes = [VideoIndex.open(source) for source in sources]
    if any(index.folder == place for index in indexes):
        raise InvalidInput(f"{place}: --out is one of the indexes to merge; name another")
    is_there = (place / "manifest.json").exists()
    target = VideoIndex.open(place) if is_there else None
    first = target or indexes[0]
    for index in indexes:
        _check_equal(first, index)
    target = target or VideoIndex.create_for(place, indexes[0].manifest)
    with target.writing() as catalog:
        known = Holdings.of(catalog)
        reports = [Merging(index, target, catalog, known).run() for index in indexes]
    return Report(
        num_added=sum(report.num_added for report in reports),
        num_unchanged=sum(report.num_unchanged for report in reports),
        num_segments=sum(report.num_segments for report in reports),
        rejected=tuple(rejection for report in reports for rejection in report.rejected),
        duration_s=time.monotonic() - started,
    )


def _check_equal(first: VideoIndex, other: VideoIndex) -> None:
    mine, its = first.manifest, other.manifest
    pairs = {
        "model": (mine.model.fingerprint, its.model.fingerprint),
        "preprocessing": (mine.preprocessing, its.preprocessing),
        "stored features": (mine.features, its.features),
        "segment length": (mine.segment_s, its.segment_s),
        "stride": (mine.stride_s, its.stride_s),
        "segmentation": (mine.segmentation, its.segmentation),
        "grid of frames": (mine.grid_step_s, its.grid_step_s),
    }
    unequal = [name for name, (a, b) in pairs.items() if a != b]
    if unequal:
        raise InvalidInput(
            f"{first.folder} and {other.folder} differ in {', '.join(unequal)}: their vectors cannot stand "
            f"side by side. Embed the videos of one again: vlm index build PATH... --out NEW --model "
            f"{mine.model.source}"
        )


@dataclass(kw_only=True, slots=True)
class Holdings:
    """What an index holds, kept current while others come in, so that it is read but once."""

    videos: dict[bytes, VideoRow]
    contents: set[str]
    names: set[str]
    rejections: dict[bytes, Rejection]

    @classmethod
    def of(cls, catalog: Catalog) -> Holdings:
        """Read them."""
        generation = catalog.latest().id
        holdings = cls(videos={}, contents=set(), names=set(), rejections={})
        for video in catalog.videos(generation):
            holdings.add(video)
        holdings.rejections = {r.path: r for r in catalog.rejections(generation)}
        return holdings

    def add(self, video: VideoRow) -> None:
        """Count a video in."""
        self.videos[video.path] = video
        self.contents.add(video.sha256)
        self.names.add(video.video_id)


class Merging:
    """The copying of one index into another, whose writer lock is held."""

    def __init__(self, source: VideoIndex, target: VideoIndex, catalog: Catalog, known: Holdings) -> None:
        self._source, self._target, self._catalog, self._known = source, target, catalog, known
        self._rows: dict[int, VideoRow] = {}  # by row in the source: the row it gets
        self._gives_way: dict[int, Changes] = {}  # by row in the source: what leaves when it comes
        self._num_known = 0
        self._conflicts: list[Rejection] = []
        self._choose()

    def run(self, *, is_shown: bool = True) -> Report:
        """Copy what the target lacks, a part at a time; a video is committed whole."""
        generation = self._source.snapshot.generation.id
        with self._source.held() as theirs:
            parts = read_parts(theirs, generation)
            context, seen = self._context(theirs, generation), theirs.seen()
        num_segments = sum(video.num_segments for video in self._rows.values())
        number, changes = self._catalog.next_part(), context
        left = {row: video.num_segments for row, video in self._rows.items()}
        begun: set[int] = set()
        for part in track(parts, "merging", unit="part") if is_shown else parts:
            part.spans = [span for span in part.spans if span.video in self._rows]
            if not part.spans:
                continue
            files, spans = self._copy(part, number)
            number += 1
            changes.files += files
            changes.spans += [replace(span, video=self._rows[span.video].row) for span in spans]
            for span in part.spans:
                begun.add(span.video)
                left[span.video] -= span.num_rows
            if not any(left[row] for row in begun):
                changes.videos = [self._rows[row] for row in sorted(begun)]
                changes.seen = [(v.path, *seen[v.path]) for v in changes.videos if v.path in seen]
                for leaving in (self._gives_way[row] for row in begun if row in self._gives_way):
                    changes.removed_videos += leaving.removed_videos
                    changes.removed_rejections += leaving.removed_rejections
                self._catalog.commit(changes)
                crash_point("after-merged-part")
                changes, begun = Changes(), set()
        if changes:
            self._catalog.commit(changes)
        return Report(
            num_added=len(self._rows),
            num_unchanged=self._num_known,
            num_segments=num_segments,
            rejected=tuple(self._conflicts),
        )

    def _choose(self) -> None:
        """Decide which videos are copied, and what they are called in the target."""
        known = self._known
        first_row = self._catalog.next_video_row()
        for video in self._source.snapshot.videos:
            path = Path(os.fsdecode(video.path))
            if video.sha256 in known.contents:
                self._num_known += 1
                continue
            if video.path in known.videos:
                detail = f"{path}: is in {self._target.folder} with another content"
                self._conflicts.append(Rejection(path=video.path, reason="same_path", detail=detail))
                continue
            self._take(video, first_row)

    def _take(self, video: VideoRow, first_row: int, former: VideoRow | None = None) -> None:
        """Have a video copied, under its name if that is free or `former`'s, whose place it takes."""
        known, name = self._known, former.video_id if former else video.video_id
        if former is None and name in known.names:
            name = assign_video_id(Path(os.fsdecode(video.path)), known.names)
        self._rows[video.row] = replace(video, row=first_row + len(self._rows), video_id=name)
        known.add(self._rows[video.row])

    def _context(self, theirs: Catalog, generation: int) -> Changes:
        """Return the folders asked for and the files rejected that the target does not know."""
        known, roots = self._known, self._catalog.roots()
        rejected = [
            r
            for r in theirs.rejections(generation)
            if r.path not in known.rejections and r.path not in known.videos
        ]
        known.rejections.update((rejection.path, rejection) for rejection in rejected)
        return Changes(roots=[root for root in theirs.roots() if root not in roots], rejected=rejected)

    def _copy(self, part: Part, number: int) -> tuple[list[LogFile], list[Span]]:
        tokens = self._source.manifest.features.store_tokens
        try:
            return copy_spans(self._source.log, [part], self._target.log, number, tokens)
        except IntegrityError:
            self._source.check_held()
            raise
