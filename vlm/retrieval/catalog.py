"""What an index holds, and since when: one SQLite file whose transactions are the only commit point.

Rows are only ever added, each tagged with the generation that added it, so that a reader which holds
generation g sees exactly the rows up to g while a writer goes on. Every generation carries a digest of the
rows it added and of its predecessor's digest; a flipped byte in any of them breaks the chain.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.crashes import crash_point
from vlm.errors import IntegrityError, InvalidInput, NoSpaceError
from vlm.retrieval.vector_log import LogFile

_SCHEMA = """
CREATE TABLE generations(id INTEGER PRIMARY KEY, created TEXT NOT NULL, parts TEXT NOT NULL,
    num_videos INTEGER NOT NULL, num_segments INTEGER NOT NULL, num_rejected INTEGER NOT NULL,
    digest TEXT NOT NULL);
CREATE TABLE videos(id INTEGER PRIMARY KEY, video_id TEXT NOT NULL, path BLOB NOT NULL,
    size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, duration_s REAL NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, codec TEXT NOT NULL, domain TEXT NOT NULL, num_segments INTEGER NOT NULL,
    generation INTEGER NOT NULL);
CREATE TABLE spans(id INTEGER PRIMARY KEY, video INTEGER NOT NULL, part INTEGER NOT NULL,
    first_row INTEGER NOT NULL, bounds BLOB NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE rejected(id INTEGER PRIMARY KEY, path BLOB NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    generation INTEGER NOT NULL);
CREATE TABLE removals(id INTEGER PRIMARY KEY, kind TEXT NOT NULL, target INTEGER NOT NULL,
    generation INTEGER NOT NULL);
CREATE TABLE roots(id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, generation INTEGER NOT NULL);
CREATE INDEX videos_generation ON videos(generation);
CREATE INDEX spans_generation ON spans(generation);
CREATE INDEX rejected_generation ON rejected(generation);
CREATE INDEX removals_generation ON removals(generation);
CREATE TABLE seen(path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, sha256 TEXT) WITHOUT ROWID;
"""
_CHAINED_TABLES = ("videos", "spans", "rejected", "removals", "roots")
_ALIVE = "generation <= :g AND id NOT IN (SELECT target FROM removals WHERE kind = '{}' AND generation <= :g)"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRow:
    """An indexed video. `row` is its key in this catalogue, `video_id` its name to the world."""

    row: int
    video_id: str
    path: bytes
    size_bytes: int
    sha256: str
    duration_s: float
    width: int
    height: int
    codec: str
    domain: str
    num_segments: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive segments of a video in one part, from `first_row`; `bounds` is float64 (n, 2) seconds."""

    video: int
    part: int
    first_row: int
    bounds: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A file that could not be indexed: a short countable reason, and the sentence behind it."""

    path: bytes
    reason: str
    detail: str
    row: int = 0


@dataclass(kw_only=True, slots=True)
class Changes:
    """What one generation adds; `spans` and `removed_*` refer to `VideoRow.row` and `Rejection.row`."""

    files: list[LogFile] = field(default_factory=list)
    videos: list[VideoRow] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    removed_videos: list[int] = field(default_factory=list)
    removed_rejections: list[int] = field(default_factory=list)
    roots: list[bytes] = field(default_factory=list)
    seen: list[tuple[bytes, int, int, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(
            (self.videos, self.rejected, self.removed_videos, self.removed_rejections, self.roots, self.seen)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One committed state of the index."""

    id: int
    num_videos: int
    num_segments: int
    num_rejected: int
    digest: str


class Catalog:
    """The catalogue of one index folder; a context manager that closes its connection."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def create(cls, path: Path, manifest_sha256: str) -> None:
        """Make an empty catalogue whose generation 0 vouches for the manifest."""
        with _translated(path):
            connection = sqlite3.connect(path, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
                connection.execute(
                    "INSERT INTO generations VALUES (0, ?, '[]', 0, 0, 0, ?)", (_now(), manifest_sha256)
                )
                connection.execute("COMMIT")
            finally:
                connection.close()

    @classmethod
    def open(cls, path: Path, write: bool = False) -> Catalog:
        """Open an existing catalogue.

        Raises:
            IntegrityError: The file is not a readable database.
        """
        if not path.is_file():
            raise InvalidInput(f"{path.parent}: no index there (it has no {path.name}); run vlm index build")
        quoted = path.resolve().as_uri()
        with _translated(path):
            mode = "rw" if write else "ro"
            connection = sqlite3.connect(f"{quoted}?mode={mode}", uri=True, isolation_level=None, timeout=30)
            try:
                connection.execute("SELECT max(id) FROM generations").fetchone()
            except sqlite3.OperationalError:
                connection.close()
                log = path.with_name(f"{path.name}-wal")
                if write or (log.exists() and log.stat().st_size):
                    raise
                # a read-only or full disk cannot hold the files that readers of a live database share; with
                # no log of unfinished writes there is nothing that they would add
                connection = sqlite3.connect(f"{quoted}?immutable=1", uri=True, isolation_level=None)
            if write:
                connection.execute("PRAGMA synchronous = FULL")
        return cls(path, connection)

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()

    def query(self, sql: str, values: Sequence[object] | dict[str, object] = ()) -> list[tuple[Any, ...]]:
        """Run a read-only statement with bound values."""
        with _translated(self.path):
            return self._connection.execute(sql, values).fetchall()

    def latest(self) -> Generation:
        """Return the newest committed generation."""
        rows = self.query(
            "SELECT id, num_videos, num_segments, num_rejected, digest FROM generations "
            "ORDER BY id DESC LIMIT 1"
        )
        if not rows:
            raise IntegrityError(f"{self.path}: the catalogue has no generation; the index must be rebuilt")
        number, videos, segments, rejected, digest = rows[0]
        return Generation(
            id=_integer(number),
            num_videos=_integer(videos),
            num_segments=_integer(segments),
            num_rejected=_integer(rejected),
            digest=str(digest),
        )

    def videos(self, generation: int) -> list[VideoRow]:
        """Return the videos that are in the index at a generation, in the order they came."""
        rows = self.query(
            "SELECT id, video_id, path, size_bytes, sha256, duration_s, width, height, codec, domain, "
            f"num_segments FROM videos WHERE {_ALIVE.format('video')} ORDER BY id",
            {"g": generation},
        )
        return [VideoRow(**dict(zip(VideoRow.__slots__, row, strict=True))) for row in rows]

    def spans(self, generation: int) -> list[Span]:
        """Return where the segments of all videos lie, removed ones included, by part and row."""
        rows = self.query(
            "SELECT video, part, first_row, bounds FROM spans WHERE generation <= ? ORDER BY part, first_row",
            (generation,),
        )
        return [Span(**dict(zip(Span.__slots__, row, strict=True))) for row in rows]

    def rejections(self, generation: int) -> list[Rejection]:
        """Return the files that were rejected and have not been indexed or removed since."""
        rows = self.query(
            f"SELECT path, reason, detail, id FROM rejected WHERE {_ALIVE.format('rejected')} ORDER BY path",
            {"g": generation},
        )
        return [Rejection(**dict(zip(Rejection.__slots__, row, strict=True))) for row in rows]

    def files(self, generation: int) -> list[LogFile]:
        """Return every file of the vector log, in the order they were written."""
        rows = self.query("SELECT parts FROM generations WHERE id <= ? ORDER BY id", (generation,))
        try:
            return [LogFile(**values) for (text,) in rows for values in json.loads(str(text))]
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"{self.path}: the list of parts is damaged ({error})") from error

    def roots(self) -> list[bytes]:
        """Return the files and folders that were asked for."""
        return [bytes(path) for (path,) in self.query("SELECT path FROM roots ORDER BY id")]

    def seen(self) -> dict[bytes, tuple[int, int, str]]:
        """Return size, modification time (ns) and hash of each file when it was last looked at."""
        rows = self.query("SELECT path, size_bytes, mtime_ns, sha256 FROM seen")
        return {bytes(path): (size, time_ns, sha) for path, size, time_ns, sha in rows}

    def next_video_row(self) -> int:
        """Return the key that the next video will get; keys are never used twice."""
        return _integer(self.query("SELECT coalesce(max(id), 0) + 1 FROM videos")[0][0])

    def commit(self, changes: Changes) -> Generation:
        """Add one generation in one transaction; on return it is on the disk.

        Raises:
            NoSpaceError: The disk is full; the previous generation stands.
        """
        latest = self.latest()
        number = latest.id + 1
        with _translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._insert(changes, number)
                parts = json.dumps([_plain(file) for file in changes.files])
                counts = self._counts(number)
                digest = self._digest(number, latest.digest, parts, counts)
                crash_point("before-commit")
                self._connection.execute(
                    "INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (number, _now(), parts, *counts, digest),
                )
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            crash_point("after-commit")
        return self.latest()

    def damaged(self, manifest_sha256: str) -> Iterator[str]:
        """Yield what is wrong with the catalogue: its pages, the manifest's hash, the chain of digests."""
        for (problem,) in self.query("PRAGMA integrity_check"):
            if problem != "ok":
                yield str(problem)
                return
        rows = self.query(
            "SELECT id, parts, num_videos, num_segments, num_rejected, digest FROM generations ORDER BY id"
        )
        previous = manifest_sha256
        for expected, (number, parts, videos, segments, rejected, digest) in enumerate(rows):
            if number != expected:
                yield f"generation {expected} is missing"
                return
            counts = (_integer(videos), _integer(segments), _integer(rejected))
            if number and self._digest(expected, previous, str(parts), counts) != digest:
                yield f"the rows of generation {number} are not the ones that were committed"
                return
            if not number and digest != manifest_sha256:
                yield "generation 0 was made for another manifest.json"
                return
            previous = str(digest)

    def _insert(self, changes: Changes, number: int) -> None:
        execute = self._connection.executemany
        execute(
            f"INSERT INTO videos VALUES ({', '.join('?' * 12)})",
            [(*(getattr(video, name) for name in VideoRow.__slots__), number) for video in changes.videos],
        )
        execute(
            "INSERT INTO spans(video, part, first_row, bounds, generation) VALUES (?, ?, ?, ?, ?)",
            [(s.video, s.part, s.first_row, s.bounds, number) for s in changes.spans],
        )
        execute(
            "INSERT INTO rejected(path, reason, detail, generation) VALUES (?, ?, ?, ?)",
            [(r.path, r.reason, r.detail, number) for r in changes.rejected],
        )
        removals = [("video", row, number) for row in changes.removed_videos]
        removals += [("rejected", row, number) for row in changes.removed_rejections]
        execute("INSERT INTO removals(kind, target, generation) VALUES (?, ?, ?)", removals)
        execute(
            "INSERT OR IGNORE INTO roots(path, generation) VALUES (?, ?)",
            [(r, number) for r in changes.roots],
        )
        execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)", changes.seen)

    def _counts(self, number: int) -> tuple[int, int, int]:
        alive = {"g": number}
        videos, segments = self._connection.execute(
            f"SELECT count(*), coalesce(sum(num_segments), 0) FROM videos WHERE {_ALIVE.format('video')}",
            alive,
        ).fetchone()
        (rejected,) = self._connection.execute(
            f"SELECT count(*) FROM rejected WHERE {_ALIVE.format('rejected')}", alive
        ).fetchone()
        return videos, segments, rejected

    def _digest(self, number: int, previous: str, parts: str, counts: tuple[int, int, int]) -> str:
        digest = hashlib.sha256(f"{previous}\n{number}\n{parts}\n{counts}\n".encode())
        for table in _CHAINED_TABLES:
            for row in self.query(f"SELECT * FROM {table} WHERE generation = ? ORDER BY id", (number,)):
                digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):
            raise NoSpaceError(
                f"{path}: no space left to write it; the index is unchanged. Free some space and run again"
            ) from error
        raise IntegrityError(f"{path}: {error}; run vlm index verify") from error


def _plain(file: LogFile) -> dict[str, object]:
    return {name: getattr(file, name) for name in LogFile.__slots__}


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise IntegrityError(f"the catalogue holds {value!r} where a whole number belongs")
    return value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
