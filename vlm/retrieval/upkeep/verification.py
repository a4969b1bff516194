"""Is every byte of an index what was written? Files against their hashes, the catalogue against its seal."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlm.errors import IntegrityError, InvalidInput
from vlm.progress import track
from vlm.retrieval.backends import cache
from vlm.retrieval.catalog import Catalog
from vlm.retrieval.catalog.seal import NAME as SEAL
from vlm.retrieval.catalog.seal import Seal, read_seal
from vlm.retrieval.reports import Finding
from vlm.retrieval.strength import calibration
from vlm.retrieval.vector_log import VectorLog

MANIFEST, CATALOG, CACHE = "manifest.json", "catalog.sqlite", "ann"
_ATTEMPTS = 5


def verify_folder(folder: Path, *, is_watched: bool = False) -> list[Finding]:
    """Return what is wrong with an index folder, by file; empty if nothing is.

    A writer may be at work meanwhile. What a killed writer left is not damage; while the catalogue is not
    sealed again, its rows are vouched for, but not the unused bytes of its pages.

    Args:
        folder: The index.
        is_watched: Show how far it is.

    Raises:
        InvalidInput: There is no index.
    """
    if not (folder / MANIFEST).exists() and not (folder / CATALOG).exists():
        raise InvalidInput(f"{folder}: no index there; run vlm index build")
    findings: list[Finding] = []
    for _ in range(_ATTEMPTS):
        before = _generation(folder)
        findings = _look(folder, is_watched)
        # a writer that committed meanwhile may have removed or replaced what was being compared
        if not findings or _generation(folder) == before:
            break
    return findings


def _generation(folder: Path) -> tuple[int, str] | None:
    try:
        with Catalog.open(folder / CATALOG) as catalog:
            latest = catalog.latest()
    except (IntegrityError, InvalidInput):
        return None
    return latest.id, latest.digest


def _look(folder: Path, is_watched: bool) -> list[Finding]:
    findings, seal = [], None
    try:
        seal = read_seal(folder)
    except IntegrityError as error:
        findings.append(Finding(name=SEAL, problem=str(error), is_derived=True))
    try:
        manifest_sha256 = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        manifest_sha256 = f"cannot be read: {error.strerror}"
    try:
        with Catalog.open(folder / CATALOG) as catalog:
            promised = seal.manifest_sha256 if seal else catalog.manifest_sha256()
            if manifest_sha256 != promised:
                problem = "its content changed (checksum mismatch)"
                findings.append(Finding(name=MANIFEST, problem=problem, is_derived=True))
            findings += [Finding(name=CATALOG, problem=text) for text in catalog.damaged(promised)]
            # the pages are only looked at when their rows are whole
            if not any(finding.name == CATALOG for finding in findings) and seal is not None:
                findings += _compare(catalog, seal)
            # rows that changed vouch for nothing: their file would be blamed for its hash in the catalogue
            is_whole = not any(finding.name == CATALOG and not finding.is_derived for finding in findings)
            files = catalog.files(catalog.latest().id) if is_whole else []
    except (IntegrityError, InvalidInput) as error:
        return [*findings, Finding(name=CATALOG, problem=str(error))]
    for file in track(files, "verifying", unit="file") if is_watched else files:
        findings += [Finding(name=name, problem=text) for name, text in VectorLog(folder).damaged([file])]
    if (found := cache.damaged(folder / CACHE)) is not None:
        findings.append(Finding(name=f"{CACHE}/{found[0]}", problem=found[1], is_derived=True))
    if (changed := calibration.damaged(folder / CACHE)) is not None:
        findings.append(Finding(name=f"{CACHE}/{calibration.NAME}", problem=changed, is_derived=True))
    return findings


def _compare(catalog: Catalog, seal: Seal) -> list[Finding]:
    """Compare a catalogue whose chain of digests is whole with its seal."""
    latest = catalog.latest()
    if seal.generation > latest.id:
        problem = f"generation {seal.generation}, which was finished, is missing"
        return [Finding(name=CATALOG, problem=problem)]
    if seal.generation < latest.id:
        return []
    image, log = catalog.image(), catalog.path.with_name(f"{CATALOG}-wal")
    # while writes wait in SQLite's log, the file may lag behind the image
    is_longer = catalog.path.stat().st_size > len(image) and not (log.exists() and log.stat().st_size)
    if seal.digest != latest.digest or seal.sha256 != hashlib.sha256(image).hexdigest() or is_longer:
        problem = "bytes that hold no committed rows changed (checksum mismatch)"
        return [Finding(name=CATALOG, problem=problem, is_derived=True)]
    return []
