"""Check a folder of shards against its manifest, byte by byte, and name everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vlm.data.shards.layout import MANIFEST, file_sha256
from vlm.data.shards.reader import ShardReader
from vlm.data.shards.remote import is_remote
from vlm.data.shards.tar_index import index_tar
from vlm.errors import DataError, IntegrityError


class Finding(NamedTuple):
    """One thing that is wrong: the file, the sample if it can be told, a countable reason, and the detail."""

    file: str
    key: str
    reason: str
    detail: str


def verify_shards(folder: Path | str, on_shard: Callable[[], object] = lambda: None) -> list[Finding]:
    """Return all damage of a folder of shards, none if every byte is as it was written.

    Args:
        folder: What `pack` or `index_foreign` made: a path, or a URL, of which all shards are then fetched.
        on_shard: Called after each shard, for progress.

    Raises:
        DataError, IntegrityError: There is no usable manifest.
    """
    reader = ShardReader(folder)
    manifest, findings = reader.manifest, list[Finding]()
    for number, record in enumerate(manifest.shards):
        try:
            path = reader.shard_path(number)
        except DataError as error:
            findings.append(Finding(record.file, "", error.reason, str(error)))
            on_shard()
            continue
        if not path.is_file():
            findings.append(Finding(record.file, "", "shard_missing", "the file is gone"))
        elif path.stat().st_size != record.num_bytes or file_sha256(path) != record.sha256:
            findings += _damage(reader, number) or [
                Finding(record.file, "", "tar_damaged", "hash or size differs, outside of the samples' bytes")
            ]
        elif manifest.is_foreign:
            findings += _damage(reader, number)
        else:
            findings += _index_damage(reader, number)
        on_shard()
    if manifest.is_foreign or is_remote(folder):
        return findings  # others keep their own files beside their shards, and a cache has its own
    given = manifest.input.get("num_items")
    if given is not None and given != manifest.num_samples + len(manifest.rejected):
        detail = (
            f"{given} items went in, {manifest.num_samples} and {len(manifest.rejected)} rejected came out"
        )
        findings.append(Finding(MANIFEST, "", "items_missing", detail))
    known = {name for record in manifest.shards for name in (record.file, record.index)} | {MANIFEST}
    for path in sorted(reader.folder.iterdir()):
        if path.name not in known:
            findings.append(Finding(path.name, "", "unknown_file", "the manifest does not know it"))
    return findings


def _damage(reader: ShardReader, shard: int) -> list[Finding]:
    """Name the samples of a damaged shard that cannot be read."""
    record = reader.manifest.shards[shard]
    findings = _index_damage(reader, shard, with_tar=False)
    if findings:
        return findings
    for number in range(record.num_samples):
        try:
            reader.read(shard, number)
        except DataError as error:
            key = reader.entry(shard, number).key
            findings.append(Finding(record.file, key, error.reason, str(error)))
    return findings


def _index_damage(reader: ShardReader, shard: int, with_tar: bool = True) -> list[Finding]:
    record = reader.manifest.shards[shard]
    try:
        entries = [reader.entry(shard, number) for number in range(record.num_samples)]
    except DataError as error:
        return [Finding(record.index, "", error.reason, str(error))]
    if with_tar:
        try:
            if index_tar(reader.shard_path(shard)) != entries:
                return [Finding(record.index, "", "index_damaged", "index and tar tell different samples")]
        except IntegrityError as error:
            return [Finding(record.file, "", "tar_damaged", str(error))]
    return []
