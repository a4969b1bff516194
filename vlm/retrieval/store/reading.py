"""A published store at one generation: its facts in memory, its vectors where they lie."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import IntegrityError, InvalidInput
from vlm.retrieval.backends.cache import described
from vlm.retrieval.catalog import Generation, Span, VideoRow
from vlm.retrieval.manifest import check_model, describe, load_snapshot
from vlm.retrieval.store.description import STRUCTURE, StoreManifest, group_name, read_manifest
from vlm.retrieval.store.tables import Table, Tables
from vlm.retrieval.vector_log import LogFile
from vlm.types import VideoTextEncoder

VIDEO_COLUMNS = tuple(field.name for field in fields(VideoRow))
SPAN_COLUMNS = tuple(field.name for field in fields(Span))


class Store:
    """One generation of a store.

    Attributes:
        folder: Its place; a URI in the form of a path.
        state: What it says of itself.
        manifest: That of the index.
        snapshot: Videos and segments, in the rows that they have in the index.

    Raises:
        InvalidInput: There is no store.
        IntegrityError: A table is missing, or holds something else than its manifest says.
        MissingExtra: lancedb is not installed.
    """

    def __init__(self, uri: str) -> None:
        self.tables = Tables(uri)
        self.state = read_manifest(self.tables)
        self.folder, self.manifest = Path(uri), self.state.index
        facts = StoredFacts(self)
        generation = Generation(
            id=self.state.index_generation,
            num_videos=self.state.num_videos,
            num_segments=self.state.num_segments,
            num_rejected=self.state.num_rejected,
            digest=self.state.digest,
        )
        self.snapshot = load_snapshot(facts, generation)
        found = int(np.count_nonzero(self.snapshot.alive))
        if (found, len(self.snapshot.videos)) != (self.state.num_segments, self.state.num_videos):
            raise IntegrityError(
                f"{uri}: expected {self.state.num_segments} segments, found {found}; publish the index again"
            )
        self.groups = self._open_groups()
        self._lock = threading.Lock()
        self._videos: sqlite3.Connection | None = None

    def is_newest(self) -> bool:
        """Whether nothing was published since."""
        return read_manifest(self.tables) == self.state

    def check_model(self, model: VideoTextEncoder) -> None:
        """Raise InvalidInput unless `model` is the one that made the index."""
        check_model(self.manifest, model, self.tables.uri)

    def held(self, name: str) -> Table:
        """Return a table in the version of this generation.

        Raises:
            IntegrityError: It is missing, or has another number of rows.
        """
        state = self.state.table(name)
        table = None if state is None else self.tables.open(name, state.version)
        if state is None or table is None:
            raise IntegrityError(f"{self.tables.uri}: its table {name} is missing; publish the index again")
        if (count := table.count()) != state.num_rows:
            raise IntegrityError(
                f"{self.tables.uri}: table {name} has {count} rows, expected {state.num_rows}; publish again"
            )
        return table

    def structure(self) -> bytes | None:
        """Return the file of the search structure that was published; None if there is none.

        Raises:
            IntegrityError: It is not what was published.
        """
        if self.state.structure is None:
            return None
        pieces = self.held(STRUCTURE).read(["number", "content"]).sort_by("number")
        content = b"".join(pieces["content"].to_pylist())
        if hashlib.sha256(content).hexdigest() != self.state.structure.sha256:
            raise IntegrityError(
                f"{self.tables.uri}: its search structure is damaged (checksum mismatch); publish the index "
                "again"
            )
        return content

    def rows_where(self, condition: str, values: Sequence[object]) -> np.ndarray:
        """Return the keys of videos that satisfy a condition of `vlm.retrieval.filters`.

        SQLite decides, as for an index, so that a filter means the same.
        """
        with self._lock:
            if self._videos is None:
                self._videos = sqlite3.connect(":memory:", check_same_thread=False)
                types = {"size_bytes": "INTEGER", "duration_s": "REAL", "path": "BLOB", "row": "INTEGER"}
                types |= dict.fromkeys(("width", "height", "num_segments"), "INTEGER")
                names = ["id" if name == "row" else name for name in VIDEO_COLUMNS]
                declared = [
                    f"{name} {types.get(column, 'TEXT')}"
                    for name, column in zip(names, VIDEO_COLUMNS, strict=True)
                ]
                self._videos.execute(f"CREATE TABLE videos ({', '.join(declared)})")
                rows = ([getattr(one, name) for name in VIDEO_COLUMNS] for one in self.snapshot.videos)
                marks = ", ".join("?" * len(names))
                self._videos.executemany(f"INSERT INTO videos VALUES ({marks})", rows)
            found = self._videos.execute(f"SELECT id FROM videos WHERE {condition}", list(values)).fetchall()
        return np.array([row for (row,) in found], np.int64)

    def info(self) -> dict[str, Any]:
        """Return counts, and what the store was made with and for; JSON-ready, as for an index."""
        manifest, generation = self.manifest, self.snapshot.generation
        return {
            "path": self.tables.uri,
            **describe(manifest, self.snapshot),
            "rejected": [],
            "store_tokens": "none",
            "token_bytes_per_segment": 0,
            "size_bytes": generation.num_segments * manifest.features.dim * 2,
            "num_dead_segments": 0,
            "structure": None if self.state.structure is None else described(self.state.structure),
            "num_groups": len(self.groups),
        }

    def roots(self) -> tuple[Path, ...]:
        """Return the files and folders that were indexed, all links followed."""
        return tuple(Path(os.path.realpath(root)) for root in self.state.roots)

    def _open_groups(self) -> dict[int, Table]:
        numbers = np.unique(np.flatnonzero(self.snapshot.alive) // self.state.group_size)
        return {number: self.held(group_name(number)) for number in numbers.tolist()}


class StoredFacts:
    """The tables of a store, read as a catalogue is."""

    def __init__(self, store: Store) -> None:
        self.path = store.folder
        self._store = store

    def videos(self, generation: int) -> list[VideoRow]:
        """Return the videos, in the order they came."""
        rows = self._store.held("videos").read(VIDEO_COLUMNS).to_pylist()
        return sorted((VideoRow(**row) for row in rows), key=lambda video: video.row)

    def spans(self, generation: int) -> list[Span]:
        """Return where their segments lie, by part and row."""
        rows = self._store.held("spans").read(SPAN_COLUMNS).to_pylist()
        return sorted((Span(**row) for row in rows), key=lambda span: (span.part, span.first_row))

    def files(self, generation: int) -> list[LogFile]:
        """Return the parts of vectors, in row order."""
        return list(self._store.state.files)


def manifest_or_none(tables: Tables) -> StoreManifest | None:
    """Return the manifest; None if there is none, or none that can be read."""
    try:
        return read_manifest(tables)
    except (IntegrityError, InvalidInput):
        return None
