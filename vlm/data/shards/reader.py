"""Read samples by the index, checking every byte against its checksum; tar headers are never trusted."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.shards.layout import Entry, Manifest, Member, ShardRecord, digest, parse_index, read_manifest
from vlm.data.shards.tar_index import split_name
from vlm.errors import DataError

_INDEXES_KEPT = 64


class RawSample(NamedTuple):
    """A sample as it lies in its shard: its key, and extension → bytes."""

    key: str
    members: dict[str, bytes]


class ShardReader:
    """Random access to the samples of a folder of shards; usable from many threads, picklable.

    Raises:
        DataError, IntegrityError: The folder has no usable manifest.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

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
        record = self.manifest.shards[shard]
        entry = self.entry(shard, number)
        path = self.folder / record.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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

    def _index(self, shard: int) -> list[Entry]:
        with self._lock:
            found = self._indexes.get(shard)
            if found is None:
                found = _load_index(self.folder, self.manifest.shards[shard])
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
