"""An index into a store: what differs is written, and the manifest last, so that readers see all or nothing.

A reader holds the versions that its manifest names. They are removed once the next generation has stood for
a while, by which time every server follows it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.crashes import crash_point
from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval.backends import cache
from vlm.retrieval.backends.cache import Label
from vlm.retrieval.catalog import Span, VideoRow
from vlm.retrieval.durability import WriterLock
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.store.description import (
    FORMAT,
    STRUCTURE,
    Grades,
    StoreManifest,
    TableState,
    group_name,
    write_manifest,
)
from vlm.retrieval.store.reading import SPAN_COLUMNS, VIDEO_COLUMNS, Store, StoredFacts, manifest_or_none
from vlm.retrieval.store.tables import Table, Tables, among, local_folder
from vlm.retrieval.strength.calibration import load as load_calibration
from vlm.retrieval.words.search import NO_MODEL

GROUP_SIZE = 1_000_000
SAFE_AGE_S = 600.0
_ROWS_AT_ONCE = 16384
_KEYS_AT_ONCE = 10_000
_PIECE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a publication did.

    Attributes:
        generation: Of the store.
        num_videos: What it holds.
        num_segments: What it holds.
        num_groups: In so many tables.
        num_added: Segments that were written.
        num_removed: Segments that were removed.
    """

    generation: int
    num_videos: int
    num_segments: int
    num_groups: int
    num_added: int
    num_removed: int


def publish(
    index: VideoIndex, uri: str, *, group_size: int | None = None, safe_age_s: float = SAFE_AGE_S
) -> Published:
    """Make a store hold what an index holds.

    Only one process may publish to a store at a time; on a file system a lock sees to it.

    Args:
        index: The index, at the generation that it holds.
        uri: A folder, or the URI of an object store.
        group_size: Segments in a table; what the store has, or a million. Another than the store has means
            that all is written again.
        safe_age_s: For how long versions are kept that are not the newest.

    Raises:
        InvalidInput: The store belongs to another model, or a number is out of range.
        CapabilityError: The index has no model.
        BusyError: Somebody else publishes, or the index was compacted since it was opened.
        MissingExtra: lancedb is not installed.
    """
    if group_size is not None and group_size < 1:
        raise InvalidInput(f"expected a group size of at least 1, got {group_size}")
    if index.manifest.model.kind == NO_MODEL:
        raise CapabilityError("an index without a model has no vectors to publish")
    tables, lock = Tables(uri), _lock(uri)
    with lock:
        return _Publication(index, tables, group_size, safe_age_s).run()


class _Publication:
    """One run: the index's facts beside the store's."""

    def __init__(self, index: VideoIndex, tables: Tables, group_size: int | None, safe_age_s: float) -> None:
        self.index, self.tables = index, tables
        self.before = manifest_or_none(tables)
        if self.before is not None and self.before.index.model != index.manifest.model:
            raise InvalidInput(
                f"{tables.uri} holds an index of model {self.before.index.model.name!r}, expected "
                f"{index.manifest.model.name!r}; choose another place for --to"
            )
        self.group_size = group_size or (GROUP_SIZE if self.before is None else self.before.group_size)
        with index.held() as catalog:
            number = index.snapshot.generation.id
            known = {video.row for video in index.snapshot.videos}
            self.spans = [span for span in catalog.spans(number) if span.video in known]
            self.files = tuple(file for file in catalog.files(number) if file.name.startswith("vectors/"))
            self.roots = tuple(os.fsdecode(root) for root in catalog.roots())
        self.vectors = index.vectors()
        self.safe_age_s = safe_age_s
        self.counts: Counter[str] = Counter()

    def run(self) -> Published:
        old = self._continued()
        if old is not None and self.before is not None:
            self._forget(self.before)
        snapshot = self.index.snapshot
        groups = self._groups(old)
        structure, pieces = self._structure(old)
        states = [
            self._facts("videos", old, snapshot.videos, VIDEO_COLUMNS),
            self._facts("spans", old, self.spans, SPAN_COLUMNS),
            *groups,
            *pieces,
        ]
        calibration = load_calibration(self.index.folder / "ann")
        generation = 1 + (0 if self.before is None else self.before.generation)
        counts = snapshot.generation
        crash_point("store-before-manifest")
        write_manifest(
            self.tables,
            StoreManifest(
                format=FORMAT,
                generation=generation,
                published=time.time(),
                index=self.index.manifest,
                index_generation=counts.id,
                digest=counts.digest,
                num_videos=counts.num_videos,
                num_segments=counts.num_segments,
                num_rejected=counts.num_rejected,
                group_size=self.group_size,
                files=self.files,
                roots=self.roots,
                tables=tuple(states),
                grades=None
                if calibration is None
                else Grades(bank=calibration.bank, num_rows=calibration.num_rows, scores=calibration.scores),
                structure=structure,
            ),
        )
        return Published(
            generation=generation,
            num_videos=counts.num_videos,
            num_segments=counts.num_segments,
            num_groups=len(groups),
            num_added=self.counts["added"],
            num_removed=self.counts["removed"],
        )

    def _continued(self) -> Store | None:
        """Return the store as it is, if the index has only grown and shrunk since."""
        before = self.before
        if before is None or before.group_size != self.group_size:
            return None
        if before.files != self.files[: len(before.files)]:
            return None
        try:
            return Store(self.tables.uri)
        except Exception:  # whatever is wrong with it, it is written again
            return None

    def _forget(self, before: StoreManifest) -> None:
        """Remove what the generations before this one held, if every reader had the time to follow."""
        if time.time() - before.published < self.safe_age_s:
            return
        for state in before.tables:
            table = self.tables.open(state.name)
            if table is not None and table.version == state.version:
                table.forget(state.version, self.safe_age_s)

    def _table(self, name: str) -> Table | None:
        """Return the newest version of a table, which then is what the store's manifest names."""
        state = None if self.before is None else self.before.table(name)
        table = None if state is None else self.tables.open(name)
        if table is not None and state is not None:
            table.go_back(state.version)  # from what a killed publication left
        return table

    def _facts(
        self,
        name: str,
        old: Store | None,
        rows: Sequence[VideoRow | Span],
        columns: Sequence[str],
    ) -> TableState:
        """Bring a table of facts in line."""
        key = "row" if name == "videos" else "video"
        before: list[Any] = []
        if old is not None:
            facts = StoredFacts(old)
            before = list(facts.videos(0) if name == "videos" else facts.spans(0))
        table = None if old is None else self._table(name)
        if table is None:
            table = self.tables.write(name, _arrow(rows, columns))
        else:
            is_there, is_wanted = set(before), set(rows)
            changed = {getattr(row, key) for row in is_there ^ is_wanted}
            _delete(table, key, sorted({getattr(row, key) for row in is_there} & changed))
            if new := [row for row in rows if getattr(row, key) in changed]:
                table.append(_arrow(new, columns))
            if changed:
                table.compact()
        return TableState(name=name, version=table.version, num_rows=len(rows))

    def _structure(self, old: Store | None) -> tuple[Label | None, list[TableState]]:
        """Bring the index's structure along if it looks through lists; what compares everything is none."""
        found = cache.load(self.index.folder / "ann")
        if found is None or found[0].plan.kind != "lists":
            return None, []
        label, content = found
        if self.vectors.prefix_key(label.num_rows) != label.key:
            return None, []
        is_there = old is not None and old.state.structure == label
        table = self._table(STRUCTURE) if is_there else None
        if table is None:
            pieces = [content[first : first + _PIECE_BYTES] for first in range(0, len(content), _PIECE_BYTES)]
            table = self.tables.write(STRUCTURE, _numbered(pieces))
        return label, [TableState(name=STRUCTURE, version=table.version, num_rows=table.count())]

    def _groups(self, old: Store | None) -> list[TableState]:
        """Bring the groups in line; those that nothing is left of keep no place in the manifest."""
        alive = self.index.snapshot.alive
        before = np.zeros(len(alive), bool)
        if old is not None:
            before[: len(old.snapshot.alive)] = old.snapshot.alive
        states = []
        for first in range(0, len(alive), self.group_size):
            name, last = group_name(first // self.group_size), first + self.group_size
            live = np.flatnonzero(alive[first:last]) + first
            if len(live):
                was = before[first:last]
                gone = np.flatnonzero(was & ~alive[first:last]) + first
                new = np.flatnonzero(~was & alive[first:last]) + first
                states.append(self._group(name, old, live, gone, new))
                crash_point("store-after-group")
        return states

    def _group(
        self, name: str, old: Store | None, live: np.ndarray, gone: np.ndarray, new: np.ndarray
    ) -> TableState:
        known = None if old is None else old.state.table(name)
        table = self._table(name) if known is not None else None
        largest = 0.0 if table is None or known is None else known.largest_norm
        if table is not None:
            _delete(table, "segment", gone.tolist())
        for first in range(0, len(new), _ROWS_AT_ONCE):
            rows = new[first : first + _ROWS_AT_ONCE]
            values = self.vectors.gather(rows)
            largest = max(largest, float(np.linalg.norm(values.astype(np.float64), axis=1).max()))
            block = _segments(rows, values)
            if table is None:
                table = self.tables.write(name, block)
            else:
                table.append(block)
        assert table is not None
        if len(gone) or len(new):
            table.compact()
        self.counts.update(added=len(new), removed=len(gone))
        digest = hashlib.sha256(live.astype("<i8").tobytes()).hexdigest()
        return TableState(
            name=name, version=table.version, num_rows=len(live), sha256=digest, largest_norm=largest
        )


def _lock(uri: str) -> AbstractContextManager[object]:
    folder = local_folder(uri)
    if folder is None:
        return nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return WriterLock(folder)


def _delete(table: Table, key: str, keys: Sequence[int]) -> None:
    for first in range(0, len(keys), _KEYS_AT_ONCE):
        table.delete(among(key, keys[first : first + _KEYS_AT_ONCE]))


def _arrow(rows: Sequence[VideoRow | Span], columns: Sequence[str]) -> Any:
    """Return an Arrow table of videos or spans; its types do not depend on there being any."""
    import pyarrow

    types = {"duration_s": pyarrow.float64(), "path": pyarrow.binary()}
    types |= dict.fromkeys(("bounds", "hashes"), pyarrow.large_binary())
    types |= dict.fromkeys(("video_id", "sha256", "codec", "domain", "tags"), pyarrow.string())
    schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in columns])
    return pyarrow.table({name: [getattr(row, name) for row in rows] for name in columns}, schema=schema)


def _numbered(pieces: Sequence[bytes]) -> Any:
    """Return an Arrow table of pieces of a file."""
    import pyarrow

    contents = pyarrow.array(pieces, pyarrow.large_binary())
    return pyarrow.table({"number": pyarrow.array(range(len(pieces)), pyarrow.int64()), "content": contents})


def _segments(rows: np.ndarray, vectors: np.ndarray) -> Any:
    import pyarrow

    flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pyarrow.table({"segment": pyarrow.array(rows.astype(np.int64)), "vector": column})
