"""What is to be done about the files found: compared with what is indexed, by time, then by content."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlm.retrieval.catalog import Catalog, Changes, Span, VideoRow
from vlm.retrieval.durability import hash_file
from vlm.retrieval.ingest.presence import is_gone, state_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file that is to be indexed, and the indexed video that it replaces, if any."""

    path: Path
    replaces: VideoRow | None = None


@dataclass(kw_only=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        new: The files to embed, in order.
        changes: What is known without embedding: renamed and gone videos, new modification times.
        num_unchanged: Videos that stay as they are.
        num_renamed: Videos whose file was found elsewhere.
        num_gone: Videos whose file is gone, and that are to be removed.
    """

    new: list[Source] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    num_unchanged: int = 0
    num_renamed: int = 0
    num_gone: int = 0


def plan_sources(
    catalog: Catalog,
    files: Sequence[Path],
    *,
    rehash: bool = False,
    drop_gone: bool | Collection[bytes] = False,
) -> Plan:
    """Divide files into those to embed and those whose vectors are there, perhaps under another name.

    A file with the size and modification time it had is taken as unchanged. One whose content was indexed
    under a path that is gone, or that holds something else now, is that video renamed.

    Args:
        catalog: What is indexed.
        files: The files found.
        rehash: Look at the content of every file.
        drop_gone: Remove the videos whose file is gone, and forget rejected files that are; all, or those of
            these paths.

    Returns:
        The plan. Files that were rejected before come last among the new ones, so that trying them again does
        not change the batches of the others.
    """
    planner = _Planner(catalog)
    others = planner.set_unchanged_aside(files, rehash)
    moved = planner.find_moved(others)
    planner.rename(moved)
    planner.divide([file for file in others if file not in moved])
    if drop_gone:
        planner.drop_gone(None if drop_gone is True else drop_gone)
    return planner.plan


class _Planner:
    """The state of one comparison; `plan` grows from step to step."""

    def __init__(self, catalog: Catalog) -> None:
        self.plan = Plan()
        self._catalog = catalog
        self._generation = catalog.latest().id
        self._known = {video.path: video for video in catalog.videos(self._generation)}
        self._rejections = {r.path: r for r in catalog.rejections(self._generation)}
        self._seen, self._roots = catalog.seen(), catalog.roots()
        self._taken: set[int] = set()  # rows of videos that have a new path

    def set_unchanged_aside(self, files: Sequence[Path], rehash: bool) -> list[Path]:
        """Return the files that are unknown or hold something else than they did."""
        others = []
        for file in files:
            path, state = os.fsencode(file), state_of(file)
            video, was = self._known.get(path), self._seen.get(path, (None, None, ""))[:2]
            if video is not None and state == was and not rehash:
                self.plan.num_unchanged += 1
            elif video is not None and state is not None and _content(file) == video.sha256:
                self.plan.num_unchanged += 1
                if state != was:
                    self.plan.changes.seen.append((path, *state, video.sha256))
            else:
                others.append(file)
        return others

    def find_moved(self, files: Sequence[Path]) -> dict[Path, VideoRow]:
        """Return the files whose content was indexed under a path that no longer holds it."""
        emptied = {os.fsencode(file) for file in files}
        by_size: dict[int, list[VideoRow]] = {}
        for video in self._known.values():
            by_size.setdefault(video.size_bytes, []).append(video)
        moved: dict[Path, VideoRow] = {}
        for file in files:
            state = state_of(file)
            candidates = by_size.get(state[0], []) if state else []
            candidates = [v for v in candidates if v.path in emptied or is_gone(v.path)]
            sha256 = _content(file) if candidates else None
            for video in candidates:
                if video.sha256 == sha256 and video.row not in self._taken:
                    moved[file] = video
                    self._taken.add(video.row)
                    break
        return moved

    def rename(self, moved: dict[Path, VideoRow]) -> None:
        """Give each moved video a row with its new path over the same segments."""
        spans: dict[int, list[Span]] = {row: [] for row in self._taken}
        for span in self._catalog.spans(self._generation) if moved else ():
            if span.video in spans:
                spans[span.video].append(span)
        changes = self.plan.changes
        for row, (file, video) in enumerate(moved.items(), start=self._catalog.next_video_row()):
            path, state = os.fsencode(file), state_of(file)
            changes.removed_videos.append(video.row)
            changes.videos.append(replace(video, row=row, path=path))
            changes.spans += [replace(span, video=row) for span in spans[video.row]]
            if state is not None:
                changes.seen.append((path, *state, video.sha256))
            if path in self._rejections:
                changes.removed_rejections.append(self._rejections[path].row)
            former = self._known.get(path)
            if former is not None and former.row not in self._taken:
                changes.removed_videos.append(former.row)  # what lay here gave way
            if video.path in self._roots:
                # a file that was named outright is looked for where it is now
                changes.removed_roots.append(self._roots[video.path])
                changes.roots.append(path)
        self.plan.num_renamed = len(moved)

    def divide(self, files: Sequence[Path]) -> None:
        """List the files that are to be embedded."""
        again: list[Source] = []
        for file in files:
            path = os.fsencode(file)
            video = self._known.get(path)
            replaces = None if video is None or video.row in self._taken else video
            (again if path in self._rejections else self.plan.new).append(
                Source(path=file, replaces=replaces)
            )
        self.plan.new += again

    def drop_gone(self, among: Collection[bytes] | None) -> None:
        """Remove the videos whose file is nowhere, and rejections likewise."""
        changes = self.plan.changes
        for path, rejection in self._rejections.items():
            if (among is None or path in among) and is_gone(path):
                changes.removed_rejections.append(rejection.row)
                if path in self._roots:
                    changes.removed_roots.append(self._roots[path])
        for path, video in self._known.items():
            if video.row not in self._taken and (among is None or path in among) and is_gone(path):
                changes.removed_videos.append(video.row)
                self.plan.num_gone += 1
                if path in self._roots:
                    changes.removed_roots.append(self._roots[path])


def _content(file: Path) -> str | None:
    """Return the hash of a file's content; None if it cannot be read, which embedding it will explain."""
    try:
        return hash_file(file)
    except OSError:
        return None
