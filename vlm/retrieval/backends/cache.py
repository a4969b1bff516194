"""The files of a search structure that can be rebuilt: written through our own writer, with their hash.

FAISS's own format has no checksum and its writer can report success on a full disk. The label is written last
and vouches for the data; without it there is no cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import IntegrityError, NoSpaceError
from vlm.retrieval.backends.calibration import Recall
from vlm.retrieval.backends.plan import Plan
from vlm.retrieval.durability import (
    TEMPORARY_PREFIX,
    hash_file,
    read_sealed,
    write_bytes_durably,
    write_sealed,
)

_DATA, _LABEL = "structure.faiss", "structure.json"
_STALE_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What cached data are of, and what was measured of them.

    Attributes:
        key: That of the rows in it.
        num_rows: How many.
        largest_norm: That of the longest of them.
        plan: The structure, and how far it looks.
        num_trained: The number of rows when it was trained.
        recalls: What it found of the truth when it held `num_rows`; empty where it is exact.
        made_on: ``cpu``, ``gpu``, or ``cpu, since the GPU failed: ...``.
        sha256: The data's hash.
        size_bytes: Their length.
    """

    key: str
    num_rows: int
    largest_norm: float
    plan: Plan
    num_trained: int
    recalls: tuple[Recall, ...] = ()
    made_on: str = "cpu"
    sha256: str = ""
    size_bytes: int = 0


def load(folder: Path) -> tuple[Label, bytes] | None:
    """Return the cached data if they are what was written."""
    try:
        label = _label(folder)
        content = (folder / _DATA).read_bytes()
    except (OSError, IntegrityError):
        return None
    return (label, content) if hashlib.sha256(content).hexdigest() == label.sha256 else None


def save(folder: Path, content: bytes, label: Label) -> None:
    """Keep data if there is a place to: a reader may have no right or no room to write."""
    with suppress(OSError, NoSpaceError, IntegrityError):
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            # whoever is writing now needs no hour
            if time.time() - leftover.stat().st_mtime > _STALE_S:
                leftover.unlink()
        (folder / _LABEL).unlink(missing_ok=True)
        sha256, size_bytes = write_bytes_durably(folder / _DATA, content)
        label = dataclasses.replace(label, sha256=sha256, size_bytes=size_bytes)
        write_sealed(folder / _LABEL, dataclasses.asdict(label))


def stated(folder: Path) -> dict[str, Any] | None:
    """Return what is known of the cached structure, JSON-ready; None if there is none.

    Returns:
        ``kind``, ``num_rows`` in it, ``bytes_per_vector``, ``breadth`` and ``depth`` of a search, ``made_on``
        (see `Label`), and for approximate ones ``recall_at_10`` and ``num_queries`` by kind of queries
        (``stored``, ``texts``).
    """
    try:
        return described(_label(folder))
    except (OSError, IntegrityError):
        return None


def described(label: Label) -> dict[str, Any]:
    """Return what a label says of its structure; see `stated`."""
    return {
        "kind": label.plan.kind,
        "num_rows": label.num_rows,
        "bytes_per_vector": label.size_bytes / max(1, label.num_rows),
        "recall_at_10": {recall.queries: recall.recall_at_10 for recall in label.recalls},
        "num_queries": {recall.queries: recall.num_queries for recall in label.recalls},
        "breadth": label.plan.breadth,
        "depth": label.plan.depth,
        "made_on": label.made_on,
    }


def damaged(folder: Path) -> tuple[str, str] | None:
    """Return (name, what is wrong) if the cache is not what was written."""
    try:
        label = _label(folder)
    except FileNotFoundError:
        return None
    except (OSError, IntegrityError) as error:
        return _LABEL, f"its content changed ({error})"
    try:
        is_whole = hash_file(folder / _DATA) == label.sha256
        # a reader may be replacing both
        if is_whole or _label(folder) != label:
            return None
    except (OSError, IntegrityError) as error:
        return _DATA, f"cannot be read ({error})"
    return _DATA, "its content changed (checksum mismatch)"


def drop(folder: Path) -> None:
    """Remove the cache; the next search makes it again."""
    for name in (_LABEL, _DATA):
        (folder / name).unlink(missing_ok=True)


def _label(folder: Path) -> Label:
    try:
        values = read_sealed(folder / _LABEL)
        values["plan"] = Plan(**values["plan"])
        values["recalls"] = tuple(Recall(**recall) for recall in values["recalls"])
        return Label(**values)
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / _LABEL}: {error}") from error
