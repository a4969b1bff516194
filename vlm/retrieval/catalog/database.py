"""The catalogue's database: generations of rows, added in transactions, read at one generation.

Rows are only ever added, each tagged with the generation that added it, so that a reader which holds
generation g sees exactly the rows up to g while a writer goes on. Only a base generation, which holds all
that is alive, takes the older ones away.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm.crashes import crash_point
from vlm.errors import BusyError, IntegrityError, InvalidInput, NoSpaceError
from vlm.retrieval.catalog.chain import CHAINED_TABLES, broken_links, digest_of
from vlm.retrieval.catalog.rows import Changes, Generation, Rejection, Span, VideoRow
from vlm.retrieval.catalog.seal import NAME as SEAL_NAME
from vlm.retrieval.catalog.seal import Seal, read_seal, write_seal
from vlm.retrieval.vector_log import LogFile

_SCHEMA = """
CREATE TABLE generations(id INTEGER PRIMARY KEY, created TEXT NOT NULL, parts TEXT NOT NULL,
    num_videos INTEGER NOT NULL, num_segments INTEGER NOT NULL, num_rejected INTEGER NOT NULL,
    digest TEXT NOT NULL);
CREATE TABLE videos(id INTEGER PRIMARY KEY, video_id TEXT NOT NULL, path BLOB NOT NULL,
    size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, duration_s REAL NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, codec TEXT NOT NULL, domain TEXT NOT NULL, num_segments INTEGER NOT NULL,
    tags TEXT NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE spans(id INTEGER PRIMARY KEY, video INTEGER NOT NULL, part INTEGER NOT NULL,
    first_row INTEGER NOT NULL, bounds BLOB NOT NULL, hashes BLOB NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE rejected(id INTEGER PRIMARY KEY, path BLOB NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    generation INTEGER NOT NULL);
CREATE TABLE removals(id INTEGER PRIMARY KEY, kind TEXT NOT NULL, target INTEGER NOT NULL,
    generation INTEGER NOT NULL);
CREATE TABLE roots(id INTEGER PRIMARY KEY, path BLOB NOT NULL, generation INTEGER NOT NULL);
CREATE INDEX videos_generation ON videos(generation);
CREATE INDEX spans_generation ON spans(generation);
CREATE INDEX rejected_generation ON rejected(generation);
CREATE INDEX removals_generation ON removals(generation);
CREATE TABLE manifest(content BLOB NOT NULL);
CREATE TABLE seen(path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, sha256 TEXT) WITHOUT ROWID;
"""
_ATTEMPTS, _PAUSE_S = 20, 0.05
_ALIVE = "generation <= :g AND id NOT IN (SELECT target FROM removals WHERE kind = '{}' AND generation <= :g)"


class Catalog:
    """The catalogue of one index folder; a context manager that closes its connection."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def create(cls, path: Path, manifest: bytes) -> None:
        """Make an empty, sealed catalogue whose generation 0 vouches for the manifest, and keeps a copy."""
        with _translated(path):
            connection = sqlite3.connect(path, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
                connection.execute(
                    "INSERT INTO generations VALUES (0, ?, '[]', 0, 0, 0, ?)",
                    (_now(), hashlib.sha256(manifest).hexdigest()),
                )
                connection.execute("INSERT INTO manifest VALUES (?)", (manifest,))
                connection.execute("COMMIT")
                cls(path, connection).seal()
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
            try:
                connection = _connect(f"{quoted}?mode={'rw' if write else 'ro'}")
            except sqlite3.OperationalError:
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

    def manifest_sha256(self) -> str:
        """Return the hash of the manifest that this catalogue was made for."""
        rows = self.query("SELECT digest FROM generations WHERE id = 0")
        if not rows:
            raise IntegrityError(f"{self.path}: generation 0 is missing; run vlm index verify")
        return str(rows[0][0])

    def hold(self, generation: Generation) -> None:
        """See from now on one state of the file, in which a generation is still there.

        Raises:
            BusyError: It was compacted away.
        """
        self.query("BEGIN")
        if not self.holds(generation):
            raise BusyError(
                f"{self.path.parent}: was compacted since it was opened; generation {generation.id} is gone, "
                "open it again (VideoIndex.refresh, Searcher.refresh)"
            )

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

    def holds(self, generation: Generation) -> bool:
        """Whether a generation is still there: not compacted away, and of this very index."""
        return self.query("SELECT digest FROM generations WHERE id = ?", (generation.id,)) == [
            (generation.digest,)
        ]

    def videos(self, generation: int, since: int = 0) -> list[VideoRow]:
        """Return the videos of a generation in the order they came; those alone that came after another."""
        rows = self.query(
            "SELECT id, video_id, path, size_bytes, sha256, duration_s, width, height, codec, domain, "
            f"num_segments, tags FROM videos WHERE {_after(since)} {_ALIVE.format('video')} ORDER BY id",
            {"g": generation, "since": since},
        )
        return [VideoRow(**dict(zip(VideoRow.__slots__, row, strict=True))) for row in rows]

    def removed_videos(self, generation: int, since: int = 0) -> list[int]:
        """Return the keys of the videos that were removed up to a generation, and after another."""
        statement = f"SELECT target FROM removals WHERE {_after(since)} generation <= :g AND kind = 'video'"
        rows = self.query(statement, {"g": generation, "since": since})
        return [_integer(row) for (row,) in rows]

    def spans(self, generation: int, since: int = 0) -> list[Span]:
        """Return where segments lie, those of removed videos included, by part and row; see `videos`."""
        rows = self.query(
            f"SELECT video, part, first_row, bounds, hashes FROM spans WHERE {_after(since)} "
            "generation <= :g ORDER BY part, first_row",
            {"g": generation, "since": since},
        )
        return [Span(**dict(zip(Span.__slots__, row, strict=True))) for row in rows]

    def rejections(self, generation: int) -> list[Rejection]:
        """Return the files that were rejected and have not been indexed or removed since."""
        rows = self.query(
            f"SELECT path, reason, detail, id FROM rejected WHERE {_ALIVE.format('rejected')} ORDER BY path",
            {"g": generation},
        )
        return [Rejection(**dict(zip(Rejection.__slots__, row, strict=True))) for row in rows]

    def files(self, generation: int, since: int = 0) -> list[LogFile]:
        """Return every file of the vector log in the order they were written; see `videos`."""
        rows = self.query(
            f"SELECT parts FROM generations WHERE {_after(since, 'id')} id <= :g ORDER BY id",
            {"g": generation, "since": since},
        )
        try:
            return [LogFile(**values) for (text,) in rows for values in json.loads(str(text))]
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"{self.path}: the list of parts is damaged ({error})") from error

    def roots(self) -> dict[bytes, int]:
        """Return the files and folders that were asked for, with their keys."""
        alive: dict[str, object] = {"g": self.latest().id}
        rows = self.query(f"SELECT path, id FROM roots WHERE {_ALIVE.format('root')} ORDER BY id", alive)
        return {bytes(path): row for path, row in rows}

    def seen(self) -> dict[bytes, tuple[int, int, str]]:
        """Return size, modification time (ns) and hash of each file when it was last looked at."""
        rows = self.query("SELECT path, size_bytes, mtime_ns, sha256 FROM seen")
        return {bytes(path): (size, time_ns, sha) for path, size, time_ns, sha in rows}

    def next_video_row(self) -> int:
        """Return the key that the next video will get; keys are never used twice."""
        return _integer(self.query("SELECT coalesce(max(id), 0) + 1 FROM videos")[0][0])

    def next_part(self) -> int:
        """Return the number that the next part will get; numbers are never used twice, not even of lost ones.

        A reader of an older generation opens its parts by number.
        """
        return _integer(self.query("PRAGMA user_version")[0][0]) + 1

    def commit(self, changes: Changes, is_base: bool = False) -> Generation:
        """Add one generation in one transaction; on return it is on the disk.

        Args:
            changes: What it adds.
            is_base: `changes` are all that the index holds, and take the place of everything before.

        Raises:
            NoSpaceError: The disk is full; the previous generation stands.
        """
        latest = self.latest()
        number, previous = latest.id + 1, latest.digest
        with _translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                if is_base:
                    previous = self.manifest_sha256()
                    for table in (*CHAINED_TABLES, "seen"):
                        self._connection.execute(f"DELETE FROM {table}")
                    self._connection.execute("DELETE FROM generations WHERE id > 0")
                self._insert(changes, number)
                parts = json.dumps([_plain(file) for file in changes.files])
                counts = self._counts(number)
                digest = digest_of(self._connection, number, previous, parts, counts)
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

    def shrink(self) -> None:
        """Give the space of deleted rows back, and leave no byte of them in the file."""
        with _translated(self.path):
            self._connection.execute("VACUUM")
        crash_point("after-vacuum")

    def seal(self) -> None:
        """Vouch for every byte of the file, unless it is sealed as it is."""
        latest = self.latest()
        with suppress(IntegrityError):
            known = read_seal(self.path.parent)
            if (known.generation, known.digest) == (latest.id, latest.digest):
                return
        with _translated(self.path):
            # nothing may wait in SQLite's log, where a damaged byte looks like a write that never ended; a
            # reader in the middle of a query is waited for, a stopped one at most as long as the timeout
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        seal = Seal(
            generation=latest.id,
            digest=latest.digest,
            sha256=hashlib.sha256(self.image()).hexdigest(),
            manifest_sha256=self.manifest_sha256(),
        )
        write_seal(self.path.parent, seal)

    def image(self) -> bytes:
        """Return every byte of the catalogue, those that are still in the log of writes included.

        Through SQLite, never by opening the file: closing it would drop the locks this process has on it.
        """
        with _translated(self.path):
            return self._connection.serialize()

    def restore(self, copy: sqlite3.Connection) -> None:
        """Put a rebuilt copy of this catalogue in its place, in one transaction; it is then to be sealed."""
        (self.path.parent / SEAL_NAME).unlink(missing_ok=True)
        with _translated(self.path):
            copy.backup(self._connection)
        crash_point("after-restore")

    def damaged(self, manifest_sha256: str) -> list[str]:
        """Return what is wrong with the catalogue's pages, its vouching for the manifest, or its chain."""
        try:
            with _translated(self.path):
                return list(broken_links(self._connection, manifest_sha256))
        except (TypeError, ValueError) as error:
            return [f"holds what was never written ({error})"]

    def _insert(self, changes: Changes, number: int) -> None:
        execute = self._connection.executemany
        execute(
            f"INSERT INTO videos VALUES ({', '.join('?' * 13)})",
            [(*(getattr(video, name) for name in VideoRow.__slots__), number) for video in changes.videos],
        )
        execute(
            "INSERT INTO spans(video, part, first_row, bounds, hashes, generation) VALUES (?, ?, ?, ?, ?, ?)",
            [(s.video, s.part, s.first_row, s.bounds, s.hashes, number) for s in changes.spans],
        )
        execute(
            "INSERT INTO rejected(path, reason, detail, generation) VALUES (?, ?, ?, ?)",
            [(r.path, r.reason, r.detail, number) for r in changes.rejected],
        )
        removals = [("video", row, number) for row in changes.removed_videos]
        removals += [("rejected", row, number) for row in changes.removed_rejections]
        removals += [("root", row, number) for row in changes.removed_roots]
        execute("INSERT INTO removals(kind, target, generation) VALUES (?, ?, ?)", removals)
        execute(
            "INSERT INTO roots(path, generation) VALUES (?, ?)",
            [(r, number) for r in changes.roots],
        )
        execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)", changes.seen)
        if changes.files:
            last = max(self.next_part() - 1, *(file.part for file in changes.files))
            self._connection.execute(f"PRAGMA user_version = {last}")

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


def _after(since: int, column: str = "generation") -> str:
    """Return a condition that names the generations after one; nothing where that is all of them."""
    # of all rows, an index by generation would only put them in the wrong order
    return f"{column} > :since AND" if since else ""


def _connect(uri: str) -> sqlite3.Connection:
    """Open a database that is there, trying for a second.

    Whoever closes it last removes what its readers share, and one that opens it just then may miss it.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
        try:
            connection.execute("SELECT max(id) FROM generations").fetchone()
            break
        except BaseException as error:
            connection.close()
            if not isinstance(error, sqlite3.OperationalError) or attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)
    return connection


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
