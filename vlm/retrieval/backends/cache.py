"""The files of a search structure that can be rebuilt: written through our own writer, with their hash.

FAISS's own format has no checksum and its writer can report success on a full disk. The label is written last
and vouches for the data; without it there is no cache.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import IntegrityError, NoSpaceError
from vlm.retrieval.durability import (
    TEMPORARY_PREFIX,
    hash_file,
    read_sealed,
    write_bytes_durably,
    write_sealed,
)

_DATA, _LABEL = "flat.faiss", "flat.json"
_STALE_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What cached data are of: the key and number of the rows, their longest norm; and the data's hash."""

    key: str
    num_rows: int
    largest_norm: float
    sha256: str


def load(folder: Path) -> tuple[Label, bytes] | None:
    """Return the cached data if they are what was written."""
    try:
        label = _label(folder)
        content = (folder / _DATA).read_bytes()
    except (OSError, IntegrityError):
        return None
    return (label, content) if hashlib.sha256(content).hexdigest() == label.sha256 else None


def save(folder: Path, content: bytes, *, key: str, num_rows: int, largest_norm: float) -> None:
    """Keep data if there is a place to: a reader may have no right or no room to write."""
    with suppress(OSError, NoSpaceError, IntegrityError):
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            # whoever is writing now needs no hour
            if time.time() - leftover.stat().st_mtime > _STALE_S:
                leftover.unlink()
        (folder / _LABEL).unlink(missing_ok=True)
        sha256, _ = write_bytes_durably(folder / _DATA, content)
        label = Label(key=key, num_rows=num_rows, largest_norm=largest_norm, sha256=sha256)
        write_sealed(folder / _LABEL, {name: getattr(label, name) for name in Label.__slots__})


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
        return Label(**read_sealed(folder / _LABEL))
    except TypeError as error:
        raise IntegrityError(f"{folder / _LABEL}: {error}") from error
