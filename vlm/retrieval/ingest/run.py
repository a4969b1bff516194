"""From files to committed segments: decode, encode, write parts, commit; every file is added or rejected.

Batches and parts are cut by counts, never by time, and a commit closes both: a build that was killed and
run again therefore encodes the same batches as one that was not, and ends with the same vectors.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from vlm.crashes import crash_point
from vlm.errors import InvalidInput
from vlm.progress import progress_bar
from vlm.retrieval.catalog import Catalog, Changes, Rejection, Span, VideoRow
from vlm.retrieval.embedding import FeatureLayout
from vlm.retrieval.ingest.encoding import Batches, make_batches
from vlm.retrieval.ingest.events import CPU, DecodedSegment, DecodeSettings, Failed, Finished, Opened
from vlm.retrieval.ingest.planning import Source
from vlm.retrieval.ingest.pool import decode_files
from vlm.retrieval.ingest.scanning import assign_video_id, domain_of
from vlm.retrieval.vector_log import TokenBlock, VectorLog
from vlm.retrieval.words.gathering import keep_tags
from vlm.types import VideoTextEncoder

# a commit costs a few synchronisations; at one segment a second a crash loses about two minutes
PART_SEGMENTS = 128
_LONGEST_PART = 4 * PART_SEGMENTS


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of the files: counts, and each rejection; see `vlm.retrieval.reports.Report`."""

    num_added: int = 0
    num_updated: int = 0
    num_segments: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    num_on_device: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Pending:
    """A file on its way: what was opened, and which of its segments lie where."""

    source: Source
    row: int
    opened: Opened | None = None
    finished: Finished | None = None
    num_taken: int = 0
    spans: list[Span] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    failure: tuple[str, str] | None = None


class Ingest:
    """One run of adding files to an index whose writer lock is held."""

    def __init__(
        self,
        catalog: Catalog,
        log: VectorLog,
        model: VideoTextEncoder,
        layout: FeatureLayout,
        settings: DecodeSettings,
        *,
        batch_size: int,
        allow_narrow_model: bool,
        roots: Sequence[bytes] = (),
    ) -> None:
        self._catalog, self._log, self._model = catalog, log, model
        self._settings = settings
        self._allow_narrow_model = allow_narrow_model
        generation = catalog.latest().id
        self._taken = {video.video_id for video in catalog.videos(generation)}
        self._old_rejections = {r.path: r for r in catalog.rejections(generation)}
        self._next_row = catalog.next_video_row()
        self._next_part = catalog.next_part()
        new_roots = [root for root in dict.fromkeys(roots) if root not in catalog.roots()]
        self._changes = Changes(roots=new_roots)
        self._waiting: Batches[tuple[_Pending, int]] = make_batches(
            model, layout, settings.grid_step_s, batch_size
        )
        self._rows: list[tuple[_Pending, int]] = []
        self._vectors: list[np.ndarray] = []
        self._tokens: list[TokenBlock] = []
        self._closed: list[_Pending] = []
        self._since_commit = 0
        self.outcome = Outcome()

    def run(self, sources: Sequence[Source]) -> Outcome:
        """Add the files in order; on return everything is committed.

        Raises:
            InvalidInput: A video is not of the model's domain, and that was not allowed.
            NoSpaceError: The disk is full; what was committed before stands.
        """
        paths = [source.path for source in sources]
        item: _Pending | None = None
        with (
            progress_bar(len(paths), "indexing", "video") as bar,
            closing(decode_files(paths, self._settings)) as events,
        ):
            for event in events:
                if item is None:
                    item = _Pending(sources[event.file], self._next_row)
                    self._next_row += 1
                if isinstance(event, Opened):
                    self._check_domain(item, event)
                    item.opened = event
                elif isinstance(event, DecodedSegment):
                    self._take(item, event)
                else:
                    self._end(item, event)
                    item = None
                    bar.update()
            self._commit()
        return self.outcome

    def _check_domain(self, item: _Pending, opened: Opened) -> None:
        domain = self._model.domain
        if domain == "open" or domain_of(opened.tags) == domain or self._allow_narrow_model:
            return
        raise InvalidInput(
            f"{item.source.path} is an ordinary video, but model {self._model.name!r} knows only the "
            f"{domain}: on anything else its answers are random. Choose a model for ordinary videos (vlm "
            "models list shows them), or add --allow-demo-model to index it all the same; every hit then "
            "carries a warning."
        )

    def _take(self, item: _Pending, segment: DecodedSegment) -> None:
        self._waiting.add((item, segment.number), segment)
        item.hashes.append(segment.hashes)
        item.num_taken += 1
        self._since_commit += 1
        if self._waiting.is_full:
            self._encode()
        if len(self._rows) >= _LONGEST_PART:
            self._write_part()

    def _end(self, item: _Pending, event: Finished | Failed) -> None:
        if isinstance(event, Failed):
            item.failure = (event.reason, event.detail)
        else:
            item.finished = event
            promised = len(item.opened.segments) if item.opened else 0
            if not promised or item.num_taken != promised:
                detail = f"{item.source.path}: {item.num_taken} of {promised} segments could be decoded"
                item.failure = ("incomplete", detail)
        self._closed.append(item)
        if self._since_commit >= PART_SEGMENTS:
            self._commit()

    def _encode(self) -> None:
        encoded = self._waiting.encode()
        if encoded is None:
            return
        for (item, _), vector in zip(encoded.keys, encoded.vectors, strict=True):
            if not np.isfinite(vector).all() and item.failure is None:
                detail = f"{item.source.path}: the model gives numbers that are not finite"
                item.failure = ("not_finite", detail)
        self._rows.extend(encoded.keys)
        self._vectors.append(encoded.vectors)
        if encoded.tokens is not None:
            self._tokens.append(encoded.tokens)
        crash_point("after-encode")

    def _write_part(self) -> None:
        """Write the encoded rows of videos that have not failed as one part, not yet committed."""
        keep = [i for i, (item, _) in enumerate(self._rows) if item.failure is None]
        rows = [self._rows[i] for i in keep]
        if rows:
            vectors = np.concatenate(self._vectors)[keep]
            tokens = TokenBlock.join(self._tokens).take(keep) if self._tokens else None
            self._changes.files += self._log.write_part(self._next_part, vectors, tokens)
            _add_spans(rows, self._next_part)
            self._next_part += 1
        self._rows, self._vectors, self._tokens = [], [], []

    def _commit(self) -> None:
        """Make all that is closed part of the index."""
        self._encode()
        self._write_part()
        changes, self._changes = self._changes, Changes()
        closed, self._closed = self._closed, []
        self._since_commit = 0
        for item in closed:
            if item.source.replaces is not None:
                changes.removed_videos.append(item.source.replaces.row)
            if item.failure is None:
                self._record_video(item, changes)
            else:
                self._record_rejection(item, changes)
        if changes:
            self._catalog.commit(changes)

    def _record_video(self, item: _Pending, changes: Changes) -> None:
        opened, finished, replaces = item.opened, item.finished, item.source.replaces
        assert opened is not None and finished is not None
        path = os.fsencode(item.source.path)
        video_id = replaces.video_id if replaces else assign_video_id(item.source.path, self._taken)
        self._taken.add(video_id)
        video = VideoRow(
            row=item.row,
            video_id=video_id,
            path=path,
            size_bytes=finished.size_bytes,
            sha256=finished.sha256,
            duration_s=opened.duration_s,
            width=opened.width,
            height=opened.height,
            codec=opened.codec,
            domain=domain_of(opened.tags),
            num_segments=len(opened.segments),
            tags=keep_tags(opened.tags),
        )
        changes.videos.append(video)
        changes.spans += item.spans
        changes.seen.append((path, finished.size_bytes, finished.mtime_ns, finished.sha256))
        if (old := self._old_rejections.pop(path, None)) is not None:
            changes.removed_rejections.append(old.row)
        self.outcome.num_segments += video.num_segments
        if finished.fallback:
            self.outcome.fallbacks[finished.fallback] += 1
        elif self._settings.decode_with != CPU:
            self.outcome.num_on_device += 1
        if replaces is None:
            self.outcome.num_added += 1
        else:
            self.outcome.num_updated += 1

    def _record_rejection(self, item: _Pending, changes: Changes) -> None:
        assert item.failure is not None
        reason, detail = item.failure
        path = os.fsencode(item.source.path)
        # names and messages may hold bytes that are not text
        detail = detail.encode("utf-8", "backslashreplace").decode()
        rejection = Rejection(path=path, reason=reason, detail=detail)
        self.outcome.rejected.append(rejection)
        old = self._old_rejections.get(path)
        if old is not None and (old.reason, old.detail) == (reason, detail):
            return
        if old is not None:
            changes.removed_rejections.append(old.row)
        changes.rejected.append(rejection)


def _add_spans(rows: list[tuple[_Pending, int]], part: int) -> None:
    """Tell each video which rows of a part are its segments; they follow one another."""
    first = 0
    while first < len(rows):
        item, last = rows[first][0], first
        while last < len(rows) and rows[last][0] is item:
            last += 1
        assert item.opened is not None
        bounds = np.array([item.opened.segments[number] for _, number in rows[first:last]], np.float64)
        hashes = np.stack([item.hashes[number] for _, number in rows[first:last]])
        item.spans.append(
            Span(
                video=item.row,
                part=part,
                first_row=first,
                bounds=bounds.tobytes(),
                hashes=hashes.tobytes(),
            )
        )
        first = last
