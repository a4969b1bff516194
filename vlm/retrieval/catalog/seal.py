"""The seal of a catalogue: the hash of every byte of it, as it was when its last writer finished.

SQLite keeps no checksums of its pages. A writer that was killed leaves a seal older than the catalogue, whose
rows the chain of digests still vouches for; the next writer seals it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm.crashes import crash_point
from vlm.errors import IntegrityError
from vlm.retrieval.durability import read_sealed, write_sealed

NAME = "catalog.seal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """The newest generation when the catalogue was sealed, its digest, and the hashes of the files."""

    generation: int
    digest: str
    sha256: str
    manifest_sha256: str


def write_seal(folder: Path, seal: Seal) -> None:
    """Seal a catalogue; its writer's last act."""
    crash_point("before-seal")
    write_sealed(folder / NAME, {name: getattr(seal, name) for name in Seal.__slots__})
    crash_point("after-seal")


def read_seal(folder: Path) -> Seal:
    """Return the seal.

    Raises:
        IntegrityError: It is missing or damaged.
    """
    try:
        return Seal(**read_sealed(folder / NAME))
    except (OSError, TypeError) as error:
        raise IntegrityError(f"{folder / NAME}: cannot be read ({error})") from error
