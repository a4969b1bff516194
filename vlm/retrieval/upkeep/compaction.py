"""Giving space back: parts without the rows of removed videos, one generation in the place of all before.

New parts are written beside the old ones, one transaction puts them in their place, and only then are the old
ones removed. A reader of an older generation goes on with the vectors it has mapped, and is told to open the
index again when it needs more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vlm.crashes import crash_point
from vlm.errors import NoSpaceError
from vlm.progress import track
from vlm.retrieval.catalog import Catalog, Changes, Rejection
from vlm.retrieval.embedding import StoreTokens
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.upkeep.copying import Part, copy_spans, read_parts
from vlm.retrieval.vector_log import VectorLog

# smaller parts are joined with their neighbours, up to the larger size: a reader maps every part
_SMALL_BYTES, _PART_BYTES = 16 << 20, 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """What a compaction did: rows and generations dropped, and bytes of the log before and after."""

    num_dropped_rows: int
    num_dropped_generations: int
    bytes_before: int
    bytes_after: int
    bytes_written: int


def compact(index: VideoIndex) -> Compaction:
    """Drop the rows of removed videos and all older generations.

    Raises:
        BusyError: Somebody else is writing this index.
        NoSpaceError: There is no room for the parts that must be written again; nothing has changed.
        IntegrityError: A part is damaged; see `repair`.
    """
    with index.writing() as catalog:
        done = rewrite(catalog, index.log, index.manifest.features.store_tokens)
    index.refresh()
    return done


def rewrite(
    catalog: Catalog,
    log: VectorLog,
    store_tokens: StoreTokens,
    lost_parts: frozenset[int] = frozenset(),
) -> Compaction:
    """Compact an index whose writer lock is held.

    Args:
        catalog: Its catalogue.
        log: Its vector log.
        store_tokens: Which features it holds.
        lost_parts: Parts that cannot be read. Videos with segments in one of them leave the index and are
            listed as rejected (``damaged``), so that the next update embeds them again.
    """
    generation = catalog.latest().id
    parts = read_parts(catalog, generation)
    old_files = {file for part in parts for file in part.files}
    lost = {span.video for part in parts if part.number in lost_parts for span in part.spans}
    for part in parts:
        part.spans = [span for span in part.spans if span.video not in lost]
    groups = list(_groups([part for part in parts if part.num_alive]))
    num_old = len(catalog.query("SELECT id FROM generations WHERE id BETWEEN 1 AND ?", (generation - 1,)))
    size = sum(part.size_bytes for part in parts)
    if sum(len(group) == 1 and _is_whole(group[0]) for group in groups) == len(parts) and not num_old:
        return Compaction(
            num_dropped_rows=0,
            num_dropped_generations=0,
            bytes_before=size,
            bytes_after=size,
            bytes_written=0,
        )
    try:
        changes = _write(catalog, log, groups, store_tokens)
    except BaseException:
        # nothing refers to the new parts yet, and a full disk needs their room
        log.sweep({file.name for file in old_files})
        raise
    _keep(catalog, generation, lost, changes)
    catalog.commit(changes, is_base=True)
    log.sweep({file.name for file in changes.files})
    crash_point("after-sweep")
    with suppress(NoSpaceError):  # the catalogue then keeps its free pages, and fills them first
        catalog.shrink()
    num_rows = sum(part.num_rows for part in parts) - sum(span.num_rows for span in changes.spans)
    return Compaction(
        num_dropped_rows=num_rows,
        num_dropped_generations=num_old,
        bytes_before=size,
        bytes_after=sum(file.size_bytes for file in changes.files),
        bytes_written=sum(file.size_bytes for file in changes.files if file not in old_files),
    )


def _is_whole(part: Part) -> bool:
    return part.num_alive == part.num_rows


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yield neighbours that become one new part; a single part without dead rows stays as it is."""
    group: list[Part] = []
    for part in parts:
        size = sum(member.size_bytes for member in (*group, part))
        is_settled = _is_whole(part) and part.size_bytes >= _SMALL_BYTES
        if group and (is_settled or size > _PART_BYTES):
            yield group
            group = []
        group.append(part)
        if is_settled:
            yield group
            group = []
    if group:
        yield group


def _write(
    catalog: Catalog, log: VectorLog, groups: Sequence[list[Part]], store_tokens: StoreTokens
) -> Changes:
    """Write the new parts; return them with those that stay, in row order."""
    changes, number = Changes(), catalog.next_part()
    for group in track(groups, "compacting", unit="part"):
        if len(group) == 1 and _is_whole(group[0]):
            changes.files += group[0].files
            changes.spans += group[0].spans
            continue
        files, spans = copy_spans(log, group, log, number, store_tokens)
        changes.files += files
        changes.spans += spans
        number += 1
    return changes


def _keep(catalog: Catalog, generation: int, lost: set[int], changes: Changes) -> None:
    """Add to a base generation all that a generation holds beside its segments, but for lost videos."""
    for video in catalog.videos(generation):
        if video.row not in lost:
            changes.videos.append(video)
            continue
        detail = "its stored vectors or token features were damaged; vlm index update embeds it again"
        changes.rejected.append(Rejection(path=video.path, reason="damaged", detail=detail))
    rejected = catalog.rejections(generation)
    changes.rejected += rejected
    changes.roots = list(catalog.roots())
    kept = {video.path for video in changes.videos} | {rejection.path for rejection in rejected}
    changes.seen = [(path, *state) for path, state in catalog.seen().items() if path in kept]
