"""Lance tables at a place: made, changed, read at one version. Only this imports lancedb."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import MissingExtra, StoreError

# longer than any version is old: what compacts must not take away what readers hold
_FOREVER = timedelta(days=365_000)


class Tables:
    """The tables at a place, a folder or the URI of an object store.

    Raises:
        MissingExtra: lancedb is not installed.
        StoreError: The place cannot be read.
    """

    def __init__(self, uri: str) -> None:
        if importlib.util.find_spec("lancedb") is None:
            raise MissingExtra("lancedb", "lance", "a published store")
        # its log would tell every table that is new on standard error
        os.environ.setdefault("LANCEDB_LOG", "error")
        import lancedb

        self.uri = uri
        with _translated(uri):
            self._connection = lancedb.connect(uri)

    def open(self, name: str, version: int | None = None) -> Table | None:
        """Return a table, held at a version if one is named; None if there is no such table."""
        try:
            table = self._connection.open_table(name)
        except (ValueError, FileNotFoundError):
            return None
        except (RuntimeError, OSError) as error:
            raise StoreError(f"{self.uri}: table {name} cannot be read ({error})") from error
        found = Table(table, f"{self.uri}, table {name}")
        if version is not None:
            with _translated(found.place):
                table.checkout(version)
        return found

    def write(self, name: str, rows: Any) -> Table:
        """Make a table of an Arrow table, or put it in the place of what it holds; old versions stay."""
        with _translated(f"{self.uri}, table {name}"):
            table = self._connection.create_table(name, rows, mode="overwrite")
        return Table(table, f"{self.uri}, table {name}")


class Table:
    """One table.

    Attributes:
        place: Where it lies, for messages.
    """

    def __init__(self, table: Any, place: str) -> None:
        self._table, self.place = table, place

    @property
    def version(self) -> int:
        """The version at hand; the newest unless another is held."""
        return int(self._table.version)

    def count(self) -> int:
        """Return the number of rows."""
        with _translated(self.place):
            return int(self._table.count_rows())

    def read(self, columns: Sequence[str], where: str | None = None) -> Any:
        """Return columns of the rows that satisfy a condition, as an Arrow table."""
        with _translated(self.place):
            query = self._table.search().select(list(columns))
            return (query if where is None else query.where(where)).to_arrow()

    def nearest(
        self, query: np.ndarray, count: int, where: str | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return segments, vectors (count, dim) float16 and rounded scores, the best scores first."""
        with _translated(self.place):
            search = self._table.search(query, vector_column_name="vector").distance_type("dot")
            if where is not None:
                search = search.where(where, prefilter=True)
            search = search.bypass_vector_index().limit(count)
            found = search.select(["segment", "vector", "_distance"]).to_arrow()
        return (*vectors_of(found, len(query)), 1.0 - found["_distance"].to_numpy().astype(np.float64))

    def append(self, rows: Any) -> None:
        """Add the rows of an Arrow table."""
        with _translated(self.place):
            self._table.add(rows)

    def delete(self, where: str) -> None:
        """Remove the rows that satisfy a condition."""
        with _translated(self.place):
            self._table.delete(where)

    def go_back(self, version: int) -> None:
        """Make what a version holds the newest."""
        if self.version != version:
            with _translated(self.place):
                self._table.checkout(version)
                self._table.restore()

    def compact(self) -> None:
        """Join small files; no version goes."""
        with _translated(self.place):
            self._table.optimize(cleanup_older_than=_FOREVER)

    def forget(self, version: int, older_than_s: float) -> None:
        """Remove the versions before this one, which must be the newest, if they are old enough."""
        self.compact()
        if self.version == version:  # or compacting made another, and the pinned one would go
            with _translated(self.place):
                self._table.optimize(cleanup_older_than=timedelta(seconds=max(older_than_s, 1e-3)))


def local_folder(uri: str) -> Path | None:
    """Return the folder that a URI names; None if it names a place in an object store."""
    if "://" in uri and not uri.startswith("file://"):
        return None
    return Path(os.path.abspath(uri.removeprefix("file://")))


def vectors_of(rows: Any, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns ``segment`` (rows,) int64 and ``vector`` (rows, dim) float16 of an Arrow table."""
    segments: np.ndarray = rows["segment"].to_numpy()
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in rows["vector"].chunks]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float16)
    return segments, flat.astype(np.float16, copy=False).reshape(len(segments), dim)


def among(column: str, keys: Sequence[int] | np.ndarray, *, negated: bool = False) -> str:
    """Return the condition that a column holds one of some whole numbers; nothing else reaches a query."""
    numbers = ",".join(str(int(key)) for key in keys)
    return f"{column} {'NOT ' if negated else ''}IN ({numbers})"


def between(column: str, first: int, end: int) -> str:
    """Return the condition that a column holds a whole number from `first` on, below `end`."""
    return f"{column} >= {int(first)} AND {column} < {int(end)}"


@contextmanager
def _translated(place: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise StoreError(
            f"{place}: Lance cannot do this ({str(error)[:300]}); if the place is within reach and this "
            "stays, publish the index again"
        ) from error
