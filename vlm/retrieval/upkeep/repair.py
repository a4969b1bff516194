"""Mending an index: what is derived is made again; what is lost is named and leaves, so the rest works."""

from __future__ import annotations

import os
import shlex
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vlm.crashes import crash_point
from vlm.errors import IntegrityError, InvalidInput
from vlm.retrieval.backends import cache, open_backend
from vlm.retrieval.catalog import Catalog
from vlm.retrieval.catalog.chain import broken_links
from vlm.retrieval.durability import WriterLock, write_bytes_durably
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.reports import Finding
from vlm.retrieval.strength import calibration
from vlm.retrieval.upkeep.compaction import rewrite
from vlm.retrieval.upkeep.verification import CACHE, CATALOG, MANIFEST, verify_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """What a repair did.

    Attributes:
        findings: The damage there was.
        lost: Paths of the videos whose vectors were damaged. They have left the index and are listed as
            rejected (``damaged``).
        command: What embeds the lost videos again; None if there are none.
    """

    findings: tuple[Finding, ...]
    lost: tuple[str, ...]
    command: str | None


def repair(folder: Path) -> Repair:
    """Repair an index folder; afterwards `verify_folder` finds nothing.

    Raises:
        InvalidInput: There is no index.
        IntegrityError: The catalogue's rows are damaged, so that nobody knows what the vectors belong to; the
            message has the command that builds the index again. Nothing has changed.
        BusyError: Somebody else is writing this index.
        NoSpaceError: There is no room for it; run it again with more.
    """
    if not any((folder / name).exists() for name in (CATALOG, MANIFEST)):
        raise InvalidInput(f"{folder}: no index there; run vlm index build")
    with WriterLock(folder):
        findings = verify_folder(folder)
        damaged = {finding.name for finding in findings}
        if CATALOG in damaged:
            _mend_catalog(folder)
        if MANIFEST in damaged:
            with Catalog.open(folder / CATALOG) as catalog:
                ((content,),) = catalog.query("SELECT content FROM manifest")
            write_bytes_durably(folder / MANIFEST, content)
            crash_point("after-manifest")
        if any(name.startswith(f"{CACHE}/") for name in damaged):
            cache.drop(folder / CACHE)
            calibration.drop(folder / CACHE)
    index = VideoIndex.open(folder)
    lost: set[str] = set()
    with index.writing() as catalog:
        lost_parts = frozenset(
            file.part for file in catalog.files(catalog.latest().id) if file.name in damaged
        )
        if lost_parts:
            before = {video.path for video in catalog.videos(catalog.latest().id)}
            rewrite(catalog, index.log, index.manifest.features.store_tokens, lost_parts=lost_parts)
            after = {video.path for video in catalog.videos(catalog.latest().id)}
            lost = {os.fsdecode(path) for path in before - after}
    index.refresh()
    if any(name.startswith(f"{CACHE}/") for name in damaged):
        open_backend("auto", index.vectors(), folder / CACHE)
    command = f"vlm index update {shlex.quote(str(folder))}" if lost else None
    return Repair(findings=tuple(findings), lost=tuple(sorted(lost)), command=command)


def _mend_catalog(folder: Path) -> None:
    """Rebuild the catalogue's pages from its rows, if those are the ones that were committed."""
    try:
        with (
            Catalog.open(folder / CATALOG, write=True) as catalog,
            closing(sqlite3.connect(":memory:")) as copy,
        ):
            image = bytearray(catalog.image())
            image[18:20] = b"\x01\x01"  # a database in memory cannot have a log of writes
            copy.deserialize(bytes(image))
            # when files were last looked at is no commitment; they will be compared by content
            copy.executescript("DELETE FROM seen; REINDEX; VACUUM;")
            problems = list(broken_links(copy, catalog.manifest_sha256()))
            if not problems:
                catalog.restore(copy)
    except (sqlite3.Error, TypeError, ValueError, IntegrityError) as error:
        problems = [str(error)]
    if problems:
        raise IntegrityError(
            f"{folder / CATALOG}: cannot be repaired ({problems[0]}): the rows that say which vectors belong "
            "to which video are damaged. Embed the videos again: vlm index build PATH... --out NEW --model "
            "SOURCE"
        )
