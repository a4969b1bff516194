"""Read samples by the index, checking every byte against its checksum; tar headers are never trusted."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.shards.layout import (
    MANIFEST,
    Entry,
    Manifest,
    Member,
    ShardRecord,
    digest,
    parse_index,
    read_manifest,
)
from vlm.data.shards.remote import CacheConfig, RemoteFolder, is_remote
from vlm.data.shards.tar_index import split_name
from vlm.errors import DataError

_INDEXES_KEPT = 64


class RawSample(NamedTuple):
    """A sample as it lies in its shard: its key, and extension → bytes."""

    key: str
    members: dict[str, bytes]


class ShardReader:
    """Random access to the samples of a folder of shards; usable from many threads, picklable.

    Args:
        folder: A path, or the URL of a folder: shards are then fetched when they are first read.
        cache: Where fetched shards are kept.

    Raises:
        DataError, IntegrityError: The folder has no usable manifest, or cannot be reached.
        InvalidInput: The URL is of a kind that cannot be read.
        MissingExtra: A package for this kind of URL is not installed.
    """

    def __init__(self, folder: Path | str, cache: CacheConfig | None = None) -> None:
        self._place = folder if is_remote(folder) else Path(folder)
        self._cache = cache or CacheConfig()
        self._start()
        if self._remote is not None:
            self._remote.refresh(MANIFEST)
        self.manifest: Manifest = read_manifest(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"_place": self._place, "_cache": self._cache, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.num_samples for shard in self.manifest.shards)

    def entry(self, shard: int, number: int) -> Entry:
        """Return where a sample lies.

        Raises:
            DataError: The shard's index is missing or damaged (``index_damaged``).
            IndexError: There is no such shard or sample.
        """
        return self._index(shard)[number]

    def read(self, shard: int, number: int) -> RawSample:
        """Return a sample's bytes.

        Raises:
            DataError: ``index_damaged``, ``shard_missing``, ``short_read`` or ``checksum``.
            IndexError: There is no such shard or sample.
        """
        try:
            return self._read(shard, number)
        except DataError as error:
            if self._remote is None or error.reason not in ("checksum", "short_read"):
                raise
            self._remote.forget(self.manifest.shards[shard].file)  # the copy rotted here: fetch it once more
            return self._read(shard, number)

    def shard_path(self, shard: int) -> Path:
        """Return where the shard lies, after fetching it if it has to be.

        Raises:
            DataError: See `RemoteFolder.local`.
        """
        record = self.manifest.shards[shard]
        if self._remote is None:
            return self.folder / record.file
        return self._remote.local(record.file, record.sha256, record.num_bytes)

    def _read(self, shard: int, number: int) -> RawSample:
        entry, record = self.entry(shard, number), self.manifest.shards[shard]
        path = self.folder / record.file
        try:
            if self._remote is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                descriptor = self._remote.open(record.file, record.sha256, record.num_bytes)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}", "shard_missing") from error
        try:
            members = {
                split_name(member.name)[1]: _read_member(descriptor, member, path) for member in entry.members
            }
        finally:
            os.close(descriptor)
        return RawSample(entry.key, members)

    def _start(self) -> None:
        self._indexes: OrderedDict[int, list[Entry]] = OrderedDict()
        self._lock = threading.Lock()
        self._remote: RemoteFolder | None = None
        if isinstance(self._place, str):
            self._remote = RemoteFolder(self._place, self._cache)
            self.folder = self._remote.folder
        else:
            self.folder = self._place

    def _index(self, shard: int) -> list[Entry]:
        with self._lock:
            found = self._indexes.get(shard)
            if found is None:
                record = self.manifest.shards[shard]
                if self._remote is not None:
                    self._remote.local(record.index, record.index_sha256)
                found = _load_index(self.folder, record)
                self._indexes[shard] = found
                if len(self._indexes) > _INDEXES_KEPT:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(shard)
            return found


def _load_index(folder: Path, record: ShardRecord) -> list[Entry]:
    path = folder / record.index
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.index_sha256:
            raise ValueError("its hash differs from the manifest's")
        entries = parse_index(data.decode("utf-8"))
        if len(entries) != record.num_samples:
            raise ValueError(f"{len(entries)} samples, the manifest says {record.num_samples}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged or missing: {error}", "index_damaged") from error
    return entries


def _read_member(descriptor: int, member: Member, path: Path) -> bytes:
    try:
        data = os.pread(descriptor, member.size, member.offset)
    except OSError as error:
        raise DataError(f"{path}: {member.name}: {error.strerror}", "short_read") from error
    if len(data) != member.size:
        raise DataError(f"{path}: {member.name}: cut after {len(data)} of {member.size} bytes", "short_read")
    if digest(data) != member.blake2b:
        raise DataError(f"{path}: {member.name}: the bytes differ from their checksum", "checksum")
    return data
