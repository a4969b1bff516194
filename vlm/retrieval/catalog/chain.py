"""The chain of digests over a catalogue's generations: what was committed, and in which order.

Generation 0 vouches for the manifest. Every later one hashes the rows that it added and its predecessor's
digest; a base generation, which compaction writes in the place of all before it, follows generation 0.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator

CHAINED_TABLES = ("videos", "spans", "rejected", "removals", "roots")


def digest_of(
    connection: sqlite3.Connection, number: int, previous: str, parts: str, counts: tuple[int, int, int]
) -> str:
    """Return the digest of one generation's rows on top of its predecessor's digest."""
    digest = hashlib.sha256(f"{previous}\n{number}\n{parts}\n{counts}\n".encode())
    for table in CHAINED_TABLES:
        rows = connection.execute(f"SELECT * FROM {table} WHERE generation = ? ORDER BY id", (number,))
        for row in rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def broken_links(connection: sqlite3.Connection, manifest_sha256: str) -> Iterator[str]:
    """Yield what is wrong with a catalogue: its pages, the manifest's hash, the chain of digests.

    Raises:
        sqlite3.Error: It cannot be read at all.
    """
    for (problem,) in connection.execute("PRAGMA integrity_check"):
        if problem != "ok":
            yield str(problem)
            return
    yield from _unvouched(connection, manifest_sha256) or _unlinked(connection, manifest_sha256)


def _unvouched(connection: sqlite3.Connection, manifest_sha256: str) -> list[str]:
    """Return what is wrong with generation 0 and the copy of the manifest."""
    if connection.execute("SELECT digest FROM generations WHERE id = 0").fetchall() != [(manifest_sha256,)]:
        return ["generation 0 is missing, or was made for another manifest.json"]
    contents = connection.execute("SELECT content FROM manifest").fetchall()
    if [hashlib.sha256(content).hexdigest() for (content,) in contents] != [manifest_sha256]:
        return ["the copy of manifest.json changed"]
    return []


def _unlinked(connection: sqlite3.Connection, manifest_sha256: str) -> list[str]:
    """Return what is wrong with the generations after the first, and with rows that belong to none."""
    rows = connection.execute(
        "SELECT id, parts, num_videos, num_segments, num_rejected, digest FROM generations "
        "WHERE id <> 0 ORDER BY id"
    ).fetchall()
    previous, last = manifest_sha256, None
    for number, parts, videos, segments, rejected, digest in rows:
        if last is not None and number != last + 1:
            return [f"generation {last + 1} is missing"]
        if digest_of(connection, number, previous, str(parts), (videos, segments, rejected)) != digest:
            return [f"the rows of generation {number} are not the ones that were committed"]
        previous, last = str(digest), number
    for table in CHAINED_TABLES:
        strays = f"FROM {table} WHERE generation NOT IN (SELECT id FROM generations WHERE id > 0)"
        if connection.execute(f"SELECT count(*) {strays}").fetchone()[0]:
            return [f"{table} has rows of no generation"]
    return []
