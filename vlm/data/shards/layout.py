"""What a folder of shards holds: tar files, an index beside each, and one manifest over all.

A shard is a plain WebDataset tar: each sample is a run of members ``KEY.EXT``: the video or picture as it
came, ``json`` with its captions and facts, ``txt`` with the first caption. The index says where each member's
bytes lie and what they hash to; the manifest counts and hashes shards and indexes and names every rejected
item.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from vlm.errors import DataError, IntegrityError

Media: TypeAlias = Literal["video", "image"]

FORMAT = "vlm-shards/1"
MANIFEST = "manifest.json"
VIDEO_EXTENSIONS = frozenset(
    {
        "mp4",
        "m4v",
        "mov",
        "mkv",
        "webm",
        "avi",
        "mpg",
        "mpeg",
        "ts",
        "mts",
        "m2ts",
        "3gp",
        "3g2",
        "flv",
        "ogv",
        "ogg",
        "wmv",
        "asf",
        "gif",
        "mxf",
        "h264",
        "hevc",
        "ivf",
        "dv",
        "rm",
        "y4m",
        "nut",
        "video",
    }
)
PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
EXTENSIONS: dict[Media, frozenset[str]] = {"video": VIDEO_EXTENSIONS, "image": PICTURE_EXTENSIONS}
_KEY = re.compile(r"[\w./-]{1,200}", re.ASCII)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample inside its shard: bytes [offset, offset + size), and their 128-bit BLAKE2b."""

    name: str
    offset: int
    size: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a shard."""

    key: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard as the manifest knows it."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    index: str
    index_sha256: str
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rejection:
    """An item that is in no sample: its name as given, a countable reason, and what happened."""

    item: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The folder's table of contents; it exists only once the folder is complete.

    Attributes:
        num_samples: Samples of all shards.
        num_bytes: Size of all shards.
        duration_s: Length of all videos, 0 where they were not opened.
        shards: The shards, in order.
        rejected: Items that are in no sample.
        odd: What was met in tars of other makers and did no harm.
        input: What the folder was made from.
        media: Whether the samples are videos or pictures.
        classes: Names of the classes that samples are labelled with; empty without labels.
    """

    num_samples: int
    num_bytes: int
    duration_s: float
    shards: tuple[ShardRecord, ...]
    rejected: tuple[Rejection, ...] = ()
    odd: tuple[Rejection, ...] = ()
    input: dict[str, Any] = field(default_factory=dict)
    media: Media = "video"
    classes: tuple[str, ...] = ()

    @property
    def is_foreign(self) -> bool:
        """Whether the tars were made by others and only indexed here."""
        return bool(self.input.get("foreign"))

    @property
    def fingerprint(self) -> str:
        """Hash of the contents: equal folders have equal ones, wherever they lie."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def check_key(key: str) -> None:
    """Raise DataError (``unsafe_key``) unless the key is a plain relative name that tar readers agree on."""
    is_plain = _KEY.fullmatch(key) is not None
    if not is_plain or ".." in key or key.startswith("/") or key.endswith("/") or "//" in key:
        raise DataError(
            f"sample key {key!r}: expected 1 to 200 of a-z, A-Z, 0-9, _ . / - and no '..'", "unsafe_key"
        )


def make_keys(names: Sequence[str]) -> list[str]:
    """Return a safe and unique key for each name: the name itself without extension where that is one.

    Anything else is spelt with ``_`` for what is not allowed, and a hash of the name is added. Equal names
    give equal keys.
    """
    plain = [_plain_key(name) for name in names]
    owners = Counter(_plain_key(name) for name in dict.fromkeys(names))
    keys = []
    for name, key in zip(names, plain, strict=True):
        stem = re.sub(r"\.[^./]*$", "", name)
        is_itself = key == stem and owners[key] == 1
        keys.append(key if is_itself else f"{key[:150]}_{digest(name.encode('utf-8', 'replace'))[:16]}")
    return keys


def _plain_key(name: str) -> str:
    stem = re.sub(r"\.[^./]*$", "", name)
    key = re.sub(r"[^A-Za-z0-9_/-]+", "_", stem)
    return "/".join(part for part in key.split("/") if part)[:190].rstrip("/") or "_"


def digest(data: bytes) -> str:
    """Return the checksum of a member: BLAKE2b of 128 bits, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either absent, as it was, or complete on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump_index(entries: list[Entry]) -> str:
    """Return the index as JSON Lines, one sample a line."""
    return "".join(
        json.dumps({"key": entry.key, "members": [list(_fields(member)) for member in entry.members]}) + "\n"
        for entry in entries
    )


def parse_index(text: str) -> list[Entry]:
    """Read what `dump_index` wrote.

    Raises:
        ValueError: A line is not an entry, or a key is unsafe.
    """
    entries = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
            members = tuple(Member(str(n), int(o), int(s), str(h)) for n, o, s, h in row["members"])
            check_key(row["key"])
        except (KeyError, TypeError, DataError) as error:
            raise ValueError(f"not an index line: {line[:80]!r}: {error}") from error
        entries.append(Entry(row["key"], members))
    return entries


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, which declares the folder complete."""
    counts = Counter(item.reason for item in manifest.rejected)
    values = {
        "format": FORMAT,
        "fingerprint": manifest.fingerprint,
        **asdict(manifest),
        "rejected_by_reason": dict(sorted(counts.items())),
    }
    write_atomically(folder / MANIFEST, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        DataError: There is none (``no_manifest``), or it is of another format (``wrong_format``).
        IntegrityError: It contradicts itself.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no {MANIFEST}; make shards with: vlm data pack --out {folder}", "no_manifest"
        ) from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{path}: expected format {FORMAT}, got {found!r}", "wrong_format")
    try:
        manifest = Manifest(
            num_samples=int(values["num_samples"]),
            num_bytes=int(values["num_bytes"]),
            duration_s=float(values["duration_s"]),
            shards=tuple(ShardRecord(**record) for record in values["shards"]),
            rejected=tuple(Rejection(**record) for record in values["rejected"]),
            odd=tuple(Rejection(**record) for record in values.get("odd", ())),
            input=dict(values["input"]),
            media=values.get("media", "video"),
            classes=tuple(map(str, values.get("classes", ()))),
        )
        if manifest.media not in get_args(Media):
            raise ValueError(f"media {manifest.media!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: damaged: {error!r}") from error
    total = sum(shard.num_samples for shard in manifest.shards)
    if manifest.fingerprint != values.get("fingerprint") or total != manifest.num_samples:
        raise IntegrityError(f"{path}: the counts or hashes contradict each other; run: vlm data verify")
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or Path(shard.index).name != shard.index:
            raise IntegrityError(f"{path}: a shard outside the folder: {shard.file!r}")
    return manifest


def media_kind(extension: str) -> Media | Literal["json", "txt"] | None:
    """Return what a member of this extension holds, None for what is never opened."""
    for media, extensions in EXTENSIONS.items():
        if extension in extensions:
            return media
    return {"json": "json", "txt": "txt"}.get(extension)  # type: ignore[return-value]


def _fields(member: Member) -> tuple[str, int, int, str]:
    return member.name, member.offset, member.size, member.blake2b
