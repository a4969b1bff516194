"""What a store says of itself: a manifest as JSON, written last, which names a version of every table."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from vlm.config import build, to_dict
from vlm.errors import ConfigError, IntegrityError, InvalidInput
from vlm.retrieval.backends.cache import Label
from vlm.retrieval.manifest import Manifest
from vlm.retrieval.store.tables import Tables
from vlm.retrieval.vector_log import LogFile

FORMAT = "vlm-store/1"
MANIFEST = "manifest"
STRUCTURE = "structure"
# a reader may meet the very moment in which a version is replaced and removed
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TableState:
    """A table of a store.

    Attributes:
        name: ``videos``, ``spans``, ``structure``, or ``group-NNNN``.
        version: Which of its versions belongs to the generation.
        num_rows: How many rows it has there.
        sha256: Hash of the numbers of its segments; empty for others.
        largest_norm: Bound on the norm of its vectors.
    """

    name: str
    version: int
    num_rows: int
    sha256: str = ""
    largest_norm: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grades:
    """What unrelated texts find, as `vlm.retrieval.strength` measured it in the index."""

    bank: str
    num_rows: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreManifest:
    """All that a server needs to open a store.

    Attributes:
        format: `FORMAT`.
        generation: Counts the publications.
        published: When, in seconds since 1970.
        index: Manifest of the index.
        index_generation: Its generation.
        digest: That generation's.
        num_videos: How many videos are in it.
        num_segments: How many segments.
        num_rejected: How many files were rejected.
        group_size: Rows of the log to a group; row r is in group r // group_size.
        files: The parts of vectors, in row order.
        roots: The files and folders that were indexed.
        tables: The tables.
        grades: For the grades of hits; None if the index has not been calibrated.
        structure: What the table ``structure`` holds; None if every vector is compared.
    """

    format: str
    generation: int
    published: float
    index: Manifest
    index_generation: int
    digest: str
    num_videos: int
    num_segments: int
    num_rejected: int
    group_size: int
    files: tuple[LogFile, ...]
    roots: tuple[str, ...]
    tables: tuple[TableState, ...]
    grades: Grades | None = None
    structure: Label | None = None

    def table(self, name: str) -> TableState | None:
        """Return a table by name."""
        return next((table for table in self.tables if table.name == name), None)


def group_name(number: int) -> str:
    """Return the name of a group's table."""
    return f"group-{number:04}"


def read_manifest(tables: Tables) -> StoreManifest:
    """Return the newest manifest.

    Raises:
        InvalidInput: There is no store, or one of another format.
        IntegrityError: The manifest is not what was written.
    """
    for attempt in range(_ATTEMPTS):
        table = tables.open(MANIFEST)
        if table is None:
            raise InvalidInput(
                f"{tables.uri}: no published index there; run vlm index publish INDEX --to URI"
            )
        try:
            rows = table.read(["content", "sha256"]).to_pylist()
            break
        except IntegrityError:
            if attempt == _ATTEMPTS - 1:
                raise
    content = rows[0]["content"] if len(rows) == 1 else ""
    if len(rows) != 1 or hashlib.sha256(content.encode()).hexdigest() != rows[0]["sha256"]:
        raise IntegrityError(
            f"{tables.uri}: its manifest is damaged (checksum mismatch); publish the index again"
        )
    values: dict[str, Any] = json.loads(content)
    if values.get("format") != FORMAT:
        raise InvalidInput(
            f"{tables.uri}: expected format {FORMAT}, got {values.get('format')!r}; publish the index again"
        )
    try:
        return build(StoreManifest, values, where=tables.uri)
    except ConfigError as error:
        raise InvalidInput(f"{tables.uri}: not the manifest of a {FORMAT} store ({error})") from error


def write_manifest(tables: Tables, manifest: StoreManifest) -> None:
    """Make a manifest the store's; from then on readers see its generation."""
    import pyarrow

    content = json.dumps(to_dict(manifest))
    row = {"content": [content], "sha256": [hashlib.sha256(content.encode()).hexdigest()]}
    tables.write(MANIFEST, pyarrow.table(row))
