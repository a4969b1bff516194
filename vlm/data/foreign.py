"""WebDataset shards of other makers: indexed where they lie, with everything that is missing or odd named."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm.data.packing import check_picture, check_video
from vlm.data.shards.layout import (
    MANIFEST,
    Entry,
    Manifest,
    Media,
    Member,
    Rejection,
    ShardRecord,
    dump_index,
    file_sha256,
    make_keys,
    media_kind,
    write_atomically,
    write_manifest,
)
from vlm.data.shards.reader import RawSample
from vlm.data.shards.tar_index import scan_tar
from vlm.data.sources import media_member, parse_facts
from vlm.errors import DataError, InvalidInput

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_TEXT = 16 << 20
_Groups = dict[str, list[tuple[Member, str]]]


@dataclass(slots=True)
class _Shard:
    """A tar, and what was found in it: key → (its members, their extensions)."""

    path: Path
    samples: _Groups = field(default_factory=dict)
    duration_s: float = 0.0


@dataclass(slots=True)
class _Report:
    rejected: list[Rejection] = field(default_factory=list)
    odd: list[Rejection] = field(default_factory=list)


def index_foreign(
    folder: Path,
    out: Path | None = None,
    *,
    media: Media = "video",
    decode: bool = True,
    on_shard: Callable[[], object] = lambda: None,
) -> Manifest:
    """Index all ``.tar`` files of a folder, so that they can be read like our own; the tars stay untouched.

    A sample is taken if exactly one video (or picture) and a caption (``json`` or ``txt``) carry its key,
    side by side. Reasons for the rest: those of `scan_tar`, ``compressed``, ``unsafe_key``,
    ``duplicate_member``, ``torn_apart``, ``damaged``, ``no_video_member``, ``no_picture_member``,
    ``no_caption``, ``bad_metadata``, and what `check_video` and `check_picture` raise. Members that are never
    opened and extensions that only some samples lack are listed as odd.

    Args:
        folder: Where the tars lie.
        out: Folder for indexes, manifest and links to the tars; None writes beside the tars.
        media: What the samples are; members of the other media are never opened.
        decode: Decode some frames of each video, which also measures durations; or each picture.
        on_shard: Called after each shard, for progress.

    Raises:
        InvalidInput: There is no tar, nothing usable in any, or a manifest already.
    """
    target = folder if out is None else out
    if (target / MANIFEST).exists():
        raise InvalidInput(f"{target}: already indexed; remove {target / MANIFEST} to do it again")
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise InvalidInput(f"{folder}: expected a folder with .tar files")
    report = _Report()
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_COMPRESSED):
            report.rejected.append(
                Rejection(path.name, "compressed", "only plain tars can be read by position")
            )
    shards = []
    for path in tars:
        shards.append(_read(path, media, decode, report))
        on_shard()
    if not any(shard.samples for shard in shards):
        reasons = ", ".join(sorted({item.reason for item in report.rejected}))
        raise InvalidInput(f"{folder}: no usable sample in {len(tars)} tars ({reasons})")
    target.mkdir(parents=True, exist_ok=True)
    keys = _unique_keys(shards)
    records = tuple(_write(shard, keys, target) for shard in shards)
    manifest = Manifest(
        num_samples=sum(record.num_samples for record in records),
        num_bytes=sum(record.num_bytes for record in records),
        duration_s=round(sum(shard.duration_s for shard in shards), 6),
        shards=records,
        rejected=tuple(report.rejected),
        odd=tuple(report.odd),
        input={"foreign": True, "decoded": decode},
        media=media,
    )
    write_manifest(target, manifest)
    return manifest


def _read(path: Path, media: Media, decode: bool, report: _Report) -> _Shard:
    """Return the usable samples of a tar."""
    scan = scan_tar(path)
    for oddity in scan.oddities:
        item = f"{path.name}:{oddity.name or oddity.offset}"
        report.rejected.append(Rejection(item, oddity.reason, f"at byte {oddity.offset}: {oddity.detail}"))
    groups, broken = _group(path.name, scan.members, report)
    usual = _usual(groups)
    for key in _beside_damage(groups, [oddity.offset for oddity in scan.oddities]):
        if {extension for _, extension in groups[key]} != usual:
            broken.setdefault(key, "damaged")
    shard = _Shard(path)
    with path.open("rb") as stream:
        for key, members in groups.items():
            item = f"{path.name}:{key}"
            try:
                if key in broken:
                    raise DataError(f"its members: {', '.join(m.name for m, _ in members)}", broken[key])
                kept, seconds = _check(stream.fileno(), key, members, media, decode)
            except DataError as error:
                report.rejected.append(Rejection(item, error.reason, str(error)))
                continue
            report.odd.extend(_oddities(item, {extension for _, extension in members}, usual, media))
            shard.samples[key] = kept
            shard.duration_s += seconds
    return shard


def _group(tar: str, members: Sequence[Member], report: _Report) -> tuple[_Groups, dict[str, str]]:
    """Return key → its members with their extensions, and key → why its members cannot be trusted."""
    groups: _Groups = {}
    broken: dict[str, str] = {}
    previous = ""
    for member in members:
        try:
            key, extension = _split(member.name)
        except DataError as error:
            report.rejected.append(Rejection(f"{tar}:{member.name}", error.reason, str(error)))
            continue
        if key in groups and key != previous:
            broken[key] = "torn_apart"
        if any(extension == other for _, other in groups.get(key, ())):
            broken[key] = "duplicate_member"
        groups.setdefault(key, []).append((member, extension))
        previous = key
    return groups, broken


def _split(name: str) -> tuple[str, str]:
    """Return key and extension of a member; the key may hold what a file system allows, but not leave it."""
    name = name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    is_safe = not name.startswith("/") and ".." not in name.split("/") and "\\" not in name
    if not is_safe or not name.isprintable() or not stem or not extension or len(name) > 1000:
        raise DataError(f"{name[:200]!r} is no plain relative name with an extension", "unsafe_key")
    return folder + slash + stem, extension.lower()


def _usual(groups: _Groups) -> set[str]:
    """Return the extensions that most samples have."""
    counts = Counter(frozenset(extension for _, extension in members) for members in groups.values())
    ordered = sorted(counts, key=lambda found: (-counts[found], sorted(found)))
    return set(ordered[0]) if ordered else set()


def _beside_damage(groups: _Groups, offsets: Sequence[int]) -> set[str]:
    """Return the keys of the last member before and the first member after each place."""
    order = sorted((member.offset, key) for key, members in groups.items() for member, _ in members)
    found = set()
    for place in offsets:
        before = [key for offset, key in order if offset <= place][-1:]
        after = [key for offset, key in order if offset > place][:1]
        found.update(before + after)
    return found


def _check(
    descriptor: int, key: str, members: list[tuple[Member, str]], media: Media, decode: bool
) -> tuple[list[tuple[Member, str]], float]:
    """Return the members that are ever opened, and the video's length (0 without decoding)."""
    kept = [(member, extension) for member, extension in members if _is_opened(extension, media)]
    contents = {}
    for member, extension in kept:
        is_text = media_kind(extension) != media
        if is_text and member.size > _MAX_TEXT:
            raise DataError(f"{member.name}: {member.size} bytes of text", "too_large")
        contents[extension] = b""
        if is_text or decode:
            contents[extension] = os.pread(descriptor, member.size, member.offset)
    raw = RawSample(key, contents)
    data = media_member(raw, media)
    parse_facts(raw)
    if decode and media == "image":
        check_picture(data)
    return kept, check_video(data).duration_s if decode and media == "video" else 0.0


def _is_opened(extension: str, media: Media) -> bool:
    return media_kind(extension) in (media, "json", "txt")


def _oddities(item: str, found: set[str], usual: set[str], media: Media) -> list[Rejection]:
    lacking, ignored = sorted(usual - found), sorted(e for e in found if not _is_opened(e, media))
    odd = [Rejection(item, "missing_member", f"lacks {', '.join(lacking)}")] if lacking else []
    return (
        [*odd, Rejection(item, "ignored_member", f"never opened: {', '.join(ignored)}")] if ignored else odd
    )


def _unique_keys(shards: Sequence[_Shard]) -> dict[tuple[str, str], str]:
    """Return (tar, key) → a safe key, with the tar's name in front if two tars share a key."""
    places = [(shard.path.name, key) for shard in shards for key in shard.samples]
    is_shared = len({key for _, key in places}) < len(places)
    names = [f"{Path(tar).stem}/{key}" if is_shared else key for tar, key in places]
    return dict(zip(places, make_keys(names), strict=True))


def _write(shard: _Shard, keys: dict[tuple[str, str], str], target: Path) -> ShardRecord:
    """Write the index of a tar and, where it is to lie elsewhere, a link to the tar."""
    path = shard.path
    entries = []
    for name, members in shard.samples.items():
        key = keys[path.name, name]
        renamed = [Member(f"{key}.{extension}", m.offset, m.size, m.blake2b) for m, extension in members]
        entries.append(Entry(key, tuple(renamed)))
    text = dump_index(entries)
    index = target / f"{path.stem}.index.jsonl"
    write_atomically(index, text)
    link = target / path.name
    if not link.exists():
        link.symlink_to(path.resolve())
    return ShardRecord(
        file=path.name,
        num_samples=len(entries),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index=index.name,
        index_sha256=hashlib.sha256(text.encode()).hexdigest(),
        duration_s=round(shard.duration_s, 6),
    )
