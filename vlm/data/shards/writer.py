"""Write samples into shards, each on the disk completely or not at all, and continue after a stop."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.shards.layout import (
    MANIFEST,
    Manifest,
    Media,
    Rejection,
    ShardRecord,
    check_key,
    digest,
    dump_index,
    file_sha256,
    sync_folder,
    write_atomically,
    write_manifest,
)
from vlm.data.shards.tar_index import index_tar
from vlm.errors import IntegrityError, InvalidInput

JOURNAL = "pack.journal.jsonl"


class ShardWriter:
    """Collects samples and rejections in order; commits a shard whenever one is full.

    The unit of progress is the committed shard: after a stop, ``num_done`` items (samples and rejections)
    are safe, and the caller goes on from there. The journal that says so becomes the manifest in `finish`.

    Args:
        folder: Where shards go; made if missing.
        identity: What decides the contents (input, options); a folder is continued only by its own.
        max_bytes: A shard is closed before it would exceed this; one sample may be larger.
        media: What the samples are.
        classes: Names of the classes that they are labelled with.

    Raises:
        InvalidInput: The folder holds the work of another identity, or foreign files.
        IntegrityError: A shard that the journal knows is missing or has another size.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        max_bytes: int = 256 << 20,
        *,
        media: Media = "video",
        classes: Sequence[str] = (),
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self._folder, self._max_bytes = folder, max_bytes
        self._identity = {**identity, "max_bytes": max_bytes}
        self._media, self._classes = media, tuple(classes)
        self._shards: list[ShardRecord] = []
        self._rejected: list[Rejection] = []
        self._keys: set[str] = set()
        self._duration_s = 0.0
        self.num_done = 0
        self._start_shard()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            raise InvalidInput(f"{folder}: already complete; choose another folder or remove it")
        self._resume()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str, members: Mapping[str, bytes], duration_s: float = 0.0) -> None:
        """Add a sample: extension → bytes.

        Raises:
            DataError: The key is unsafe (``unsafe_key``).
            ValueError: The key is there already or its last part holds a dot, or there are no members.
        """
        check_key(key)
        if key in self._keys or "." in key.rpartition("/")[2] or not members:
            raise ValueError(f"expected a new key without dots in its name, and members; got {key!r}")
        size = sum(1024 + len(data) for data in members.values())
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._commit()
        self._pending.append((key, dict(members)))
        self._pending_bytes += size
        self._pending_duration_s += duration_s
        self._pending_items += 1
        self._keys.add(key)

    def reject(self, item: str, reason: str, detail: str) -> None:
        """Note an item that will not be in any shard."""
        self._pending_rejected.append(Rejection(item, reason, detail))
        self._pending_items += 1

    def finish(self) -> Manifest:
        """Commit the rest and write the manifest.

        Raises:
            InvalidInput: There is not a single sample.
        """
        if self._pending_items:
            self._commit()
        manifest = Manifest(
            num_samples=sum(shard.num_samples for shard in self._shards),
            num_bytes=sum(shard.num_bytes for shard in self._shards),
            duration_s=round(self._duration_s, 6),
            shards=tuple(self._shards),
            rejected=tuple(self._rejected),
            input=self._identity,
            media=self._media,
            classes=self._classes,
        )
        if manifest.num_samples == 0:
            reasons = sorted({item.reason for item in self._rejected})
            (self._folder / JOURNAL).unlink(missing_ok=True)
            raise InvalidInput(
                f"{self._folder}: none of {len(self._rejected)} items could be packed ({', '.join(reasons)})"
            )
        write_manifest(self._folder, manifest)
        (self._folder / JOURNAL).unlink(missing_ok=True)
        return manifest

    def _start_shard(self) -> None:
        self._pending: list[tuple[str, dict[str, bytes]]] = []
        self._pending_rejected: list[Rejection] = []
        self._pending_bytes, self._pending_items, self._pending_duration_s = 0, 0, 0.0

    def _commit(self) -> None:
        """Write the pending samples as one shard, read it back, and note it in the journal."""
        record = self._write_shard() if self._pending else None
        line = {
            "shard": None if record is None else {name: getattr(record, name) for name in record.__slots__},
            "rejected": [[item.item, item.reason, item.detail] for item in self._pending_rejected],
            "keys": [key for key, _ in self._pending],
            "num_items": self._pending_items,
            "duration_s": self._pending_duration_s,
        }
        with (self._folder / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._apply(line)
        self._start_shard()

    def _write_shard(self) -> ShardRecord:
        from webdataset.writer import TarWriter  # only writing needs it, and it is slow to import

        name = f"shard-{len(self._shards):06d}"
        path, index = self._folder / f"{name}.tar", self._folder / f"{name}.index.jsonl"
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as stream:
            # fixed owner and time: the same input gives the same bytes
            with TarWriter(
                stream, user="vlm", group="vlm", encoder=False, compress=False, mtime=0, format="PAX_FORMAT"
            ) as tar:
                for key, members in self._pending:
                    tar.write({"__key__": key, **members})
            stream.flush()
            os.fsync(stream.fileno())
        entries = index_tar(temporary)
        found = {member.name: member.blake2b for entry in entries for member in entry.members}
        meant = {f"{k}.{e}": digest(data) for k, members in self._pending for e, data in members.items()}
        if found != meant:
            raise IntegrityError(f"{temporary}: reads back differently from what was written")
        write_atomically(index, dump_index(entries))
        os.replace(temporary, path)
        sync_folder(self._folder)
        return ShardRecord(
            file=path.name,
            num_samples=len(entries),
            num_bytes=path.stat().st_size,
            sha256=file_sha256(path),
            index=index.name,
            index_sha256=file_sha256(index),
            duration_s=round(self._pending_duration_s, 6),
        )

    def _resume(self) -> None:
        """Take over what the journal proves, and remove what a stop left half written."""
        journal = self._folder / JOURNAL
        for leftover in self._folder.glob("shard-*.tmp"):
            leftover.unlink()
        if not journal.exists():
            if any(self._folder.iterdir()):
                raise InvalidInput(f"{self._folder}: expected an empty folder or an unfinished pack of ours")
            write_atomically(journal, json.dumps({"identity": self._identity}) + "\n")
            return
        complete, _, torn = journal.read_text(encoding="utf-8").rpartition("\n")
        if torn:
            write_atomically(journal, complete + "\n")
        header, *lines = [json.loads(line) for line in complete.splitlines()]
        if header != json.loads(json.dumps({"identity": self._identity})):
            raise InvalidInput(
                f"{self._folder}: holds an unfinished pack of another input; choose another --out"
            )
        for line in lines:
            self._apply(line)
        for shard in self._shards:
            path = self._folder / shard.file
            if not path.exists() or path.stat().st_size != shard.num_bytes:
                raise IntegrityError(f"{path}: missing or changed since it was written; remove the folder")

    def _apply(self, line: Mapping[str, Any]) -> None:
        if line["shard"] is not None:
            self._shards.append(ShardRecord(**line["shard"]))
        self._rejected.extend(Rejection(*item) for item in line["rejected"])
        self._keys.update(line["keys"])
        self._duration_s += line["duration_s"]
        self.num_done += line["num_items"]
