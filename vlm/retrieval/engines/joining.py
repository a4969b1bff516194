"""Finished parts into the index, as if their files had been added to it: copied, never embedded again."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from vlm.crashes import crash_point
from vlm.errors import IntegrityError, InvalidInput
from vlm.progress import track
from vlm.retrieval.catalog import Catalog, Changes, Rejection
from vlm.retrieval.engines.tasks import Task, TaskList
from vlm.retrieval.engines.working import discard
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.reports import Report
from vlm.retrieval.upkeep.merging import Holdings, Merging
from vlm.retrieval.upkeep.verification import verify_folder


def join_finished(listing: TaskList, index: VideoIndex) -> None:
    """Bring the parts of all finished tasks into the index, in the order of the list; then they are removed.

    Raises:
        IntegrityError: A part is damaged. It is discarded, so that its task is done again.
        BusyError: Somebody else is writing the index.
        NoSpaceError: The disk is full; what was joined before stands.
    """
    finished = [task for task in listing.tasks if task.joined() is None and task.done() is not None]
    if not finished:
        return
    with index.writing() as catalog:
        roots = [os.fsencode(root) for root in listing.roots]
        new_roots = [root for root in dict.fromkeys(roots) if root not in catalog.roots()]
        if new_roots:
            catalog.commit(Changes(roots=new_roots))
        known = Holdings.of(catalog)
        for task in track(finished, "joining", unit="task"):
            _join(task, index, catalog, known)
    index.refresh()


def report_of_tasks(listing: TaskList, duration_s: float) -> Report:
    """Return what became of all files of a list whose tasks are all joined."""
    results = [result for task in listing.tasks if (result := task.joined()) is not None]
    found = listing.found
    fallbacks: Counter[str] = Counter()
    for result in results:
        fallbacks.update(result["decoded"]["fallbacks"])
    return Report(
        num_added=sum(result["num_added"] for result in results),
        num_updated=sum(result["num_updated"] for result in results),
        num_segments=sum(result["num_segments"] for result in results),
        num_renamed=found.num_renamed,
        num_unchanged=found.num_unchanged + sum(result["num_unchanged"] for result in results),
        rejected=tuple(
            Rejection(path=os.fsencode(path), reason=reason, detail=detail)
            for result in results
            for path, reason, detail in result["rejected"]
        ),
        other_files=dict(found.other_files),
        duration_s=duration_s,
        num_on_device=sum(result["decoded"]["num_on_device"] for result in results),
        fallbacks=dict(fallbacks),
    )


def _join(task: Task, index: VideoIndex, catalog: Catalog, known: Holdings) -> None:
    done = task.done()
    assert done is not None
    folder = task.folder / done["part"]
    try:
        part = VideoIndex.open(folder)
        if part.snapshot.generation.digest != done["digest"]:
            raise IntegrityError(f"{folder}: does not hold what its worker wrote")
        joining = _Joining(part, index, catalog, known)
        report = joining.run(is_shown=False)
    except (IntegrityError, InvalidInput) as error:
        if isinstance(error, IntegrityError) and not _is_damaged(folder):
            raise
        discard(task)
        raise IntegrityError(
            f"{folder}: damaged ({error}); it is discarded, and the same command embeds its "
            f"{task.num_files} files again"
        ) from error
    crash_point("before-task-joined")
    task.mark("joined.json", {**_plain(report), "decoded": done["decoded"]})
    discard(task)


def _is_damaged(folder: Path) -> bool:
    try:
        return bool(verify_folder(folder))
    except (IntegrityError, InvalidInput):
        return True


def _plain(report: Report) -> dict[str, Any]:
    return {
        "num_added": report.num_added,
        "num_updated": report.num_updated,
        "num_unchanged": report.num_unchanged,
        "num_segments": report.num_segments,
        "rejected": [[os.fsdecode(r.path), r.reason, r.detail] for r in report.rejected],
    }


class _Joining(Merging):
    """Merging with the rules of adding: equal contents may lie under several paths, and what is new wins."""

    _num_updated = 0
    _rejected: tuple[Rejection, ...] = ()

    def run(self, *, is_shown: bool = True) -> Report:
        """Copy the part; the report counts as adding does."""
        report = super().run(is_shown=is_shown)
        return Report(
            num_added=report.num_added - self._num_updated,
            num_updated=self._num_updated,
            num_unchanged=report.num_unchanged,
            num_segments=report.num_segments,
            rejected=self._rejected,
        )

    def _choose(self) -> None:
        known, first_row = self._known, self._catalog.next_video_row()
        for video in self._source.snapshot.videos:
            former, leaving = known.videos.get(video.path), Changes()
            if former is not None and former.sha256 == video.sha256:
                self._num_known += 1
                continue
            if former is not None:
                leaving.removed_videos.append(former.row)
                self._num_updated += 1
            if (rejection := known.rejections.get(video.path)) is not None:
                leaving.removed_rejections.append(rejection.row)
            self._gives_way[video.row] = leaving
            self._take(video, first_row, former)

    def _context(self, theirs: Catalog, generation: int) -> Changes:
        known, changes = self._known, Changes()
        self._rejected = tuple(theirs.rejections(generation))
        for rejection in self._rejected:
            if (former := known.videos.pop(rejection.path, None)) is not None:
                changes.removed_videos.append(former.row)
            old = known.rejections.get(rejection.path)
            if old is not None and (old.reason, old.detail) == (rejection.reason, rejection.detail):
                continue
            if old is not None:
                changes.removed_rejections.append(old.row)
            changes.rejected.append(rejection)
        return changes
