"""What two data sets have in common: videos of one name, equal files, equal pictures, equal meaning."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.data.annotations import locate_videos, read_annotations, read_folder
from vlm.data.curation.fingerprints import Fingerprint, fingerprint, near_videos
from vlm.data.decoding import DecodeLimits, Source
from vlm.data.shards.layout import MANIFEST, VIDEO_EXTENSIONS, media_kind
from vlm.data.shards.reader import ShardReader
from vlm.data.sources import parse_facts
from vlm.errors import DataError, InvalidInput
from vlm.text import clean

FORMAT = "vlm-overlap/1"
# video → (dim,) float32
Embed = Callable[[Source], npt.NDArray[np.float32]]
_YOUTUBE = re.compile(r"(?:^|[/_.])(?:v_)?([\w-]{11})(?:_\d+_\d+|_\d{6}_\d{6})?$", re.ASCII)


class Item(NamedTuple):
    """A video of a data set: name, file (path or bytes), hash of the file it came from, captions."""

    name: str
    source: Source
    sha256: str | None
    captions: tuple[str, ...] = ()


class Match(NamedTuple):
    """One video of each set that are the same: ``by`` is ``id``, ``sha256``, ``picture`` or ``embedding``."""

    by: str
    first: str
    second: str
    value: float


@dataclass(slots=True)
class Traits:
    """What is compared of a data set: item by item, in the same order, and the cleaned captions of all."""

    names: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    prints: list[Fingerprint | None] = field(default_factory=list)
    embeddings: list[npt.NDArray[np.float32] | None] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    captions: set[str] = field(default_factory=set)


def open_items(path: Path, videos: Path | None = None) -> Iterator[Item]:
    """Yield the videos of a folder of shards, of a folder of videos, or of an annotation file.

    Args:
        path: The folder or file.
        videos: Folder of an annotation file's videos.

    Raises:
        InvalidInput: There is no such path, or an annotation file comes without ``videos``.
        DataError, IntegrityError: The shards or the annotations cannot be read.
    """
    if (path / MANIFEST).is_file():
        yield from _of_shards(ShardReader(path))
        return
    if not path.exists():
        raise InvalidInput(f"{path}: no such file or folder")
    if path.is_dir():
        entries, videos = read_folder(path), path
    elif videos is None:
        raise InvalidInput(f"{path}: an annotation file needs the folder of its videos")
    else:
        entries = read_annotations(path)
    for located in locate_videos(entries, videos):
        yield Item(located.annotation.video, located.path or b"", None, located.annotation.captions)


def describe_items(
    items: Iterator[Item],
    *,
    pictures: bool = True,
    embed: Embed | None = None,
    on_item: Callable[[], object] = lambda: None,
) -> Traits:
    """Hash, look at and embed every video; one that cannot be read keeps its name and is listed.

    Raises:
        InvalidInput: There is no video.
    """
    traits = Traits()
    for item in items:
        traits.names.append(item.name)
        traits.captions.update(filter(None, map(clean, item.captions)))
        shown: Fingerprint | None = None
        vector: npt.NDArray[np.float32] | None = None
        try:
            if not item.source:
                raise DataError("no such video file, or it cannot be read from its shard", "missing")
            traits.hashes.append(item.sha256 or _sha256(item.source))
            shown = fingerprint(item.source, DecodeLimits(max_seconds=120.0)) if pictures else None
            vector = None if embed is None else embed(item.source)
        except (DataError, OSError) as error:
            traits.unreadable[item.name] = getattr(error, "reason", "unreadable")
            traits.hashes.extend([""] * (len(traits.names) - len(traits.hashes)))
        traits.prints.append(shown)
        traits.embeddings.append(vector)
        on_item()
    if not traits.names:
        raise InvalidInput("expected at least one video in each data set")
    return traits


def find_overlap(
    first: Traits, second: Traits, *, max_distance: float = 0.3, min_similarity: float = 0.95
) -> list[Match]:
    """Return every pair that some way of looking takes for the same video, in order of the second set.

    Args:
        first: Such as the training set.
        second: Such as the test set.
        max_distance: For pictures; see `near_videos`.
        min_similarity: For embeddings: smallest cosine.
    """
    matches = _equal("id", [video_id(n) for n in first.names], [video_id(n) for n in second.names])
    matches += _equal("sha256", first.hashes, second.hashes)
    rows = [number for number, shown in enumerate(first.prints) if shown is not None]
    columns = [number for number, shown in enumerate(second.prints) if shown is not None]
    near = near_videos(
        [shown for shown in first.prints if shown is not None],
        [shown for shown in second.prints if shown is not None],
        max_distance,
    )
    matches += [("picture", rows[one], columns[other], distance) for one, other, distance in near]
    matches += _similar(first.embeddings, second.embeddings, min_similarity)
    ways = ("id", "sha256", "picture", "embedding")
    ordered = sorted(matches, key=lambda match: (match[2], match[1], ways.index(match[0])))
    return [Match(by, first.names[one], second.names[other], value) for by, one, other, value in ordered]


def summarise(
    first: Traits, second: Traits, matches: Sequence[Match], hashes: tuple[str, str]
) -> dict[str, Any]:
    """Return counts and pairs, ready for JSON; a video of the second set counts once a way.

    Equal captions do not make videos equal and count by themselves; None if a set has no captions.

    Args:
        first: Such as the training set.
        second: Such as the test set.
        matches: What ``find_overlap`` found.
        hashes: What ``hash_set`` returns of each set.
    """
    ways = [way for way, is_known in (
        ("id", True), ("sha256", True),
        ("picture", any(first.prints) and any(second.prints)),
        ("embedding", _any_known(first.embeddings) and _any_known(second.embeddings)),
    ) if is_known]  # fmt: skip
    captions = {
        "num_first": len(first.captions),
        "num_second": len(second.captions),
        "shared": sorted(first.captions & second.captions),
    }
    return {
        "format": FORMAT,
        "first_sha256": hashes[0],
        "second_sha256": hashes[1],
        "num_first": len(first.names),
        "num_second": len(second.names),
        "num_second_in_first": len({match.second for match in matches}),
        "by": {way: len({match.second for match in matches if match.by == way}) for way in ways},
        "captions": captions if first.captions and second.captions else None,
        "unreadable": {"first": first.unreadable, "second": second.unreadable},
        "matches": [match._asdict() for match in matches],
        "second_videos": second.names,
    }


def hash_set(path: Path, traits: Traits) -> str:
    """Return what identifies a data set: the hash of its manifest.

    That is the manifest of a folder of shards, or the annotation file; a folder of videos has none, and the
    hash is that of the sorted lines ``sha256 name`` of its videos.
    """
    manifest = path / MANIFEST if path.is_dir() else path
    if manifest.is_file():
        return _sha256(manifest)
    lines = sorted(f"{digest} {name}" for digest, name in zip(traits.hashes, traits.names, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def video_stem(name: str) -> str:
    """Return the name of a video's file without folders and without the extension of a video."""
    path = PurePosixPath(name)
    return path.name[: -len(path.suffix)] if path.suffix[1:].lower() in VIDEO_EXTENSIONS else path.name


def video_id(name: str) -> str:
    """Return what names the video itself: a YouTube id where the name holds one, else the name's stem.

    Folders, extensions, ``v_`` in front and times behind (``ID_12_20``, ``ID_000012_000022``) say nothing of
    which video it is; clips of one video at different times count as the same.
    """
    stem = video_stem(name)
    found = _YOUTUBE.search(stem)
    has_mixture = found and re.search(r"[A-Z]", found[1]) and re.search(r"[a-z0-9_-]", found[1])
    return found[1] if found and has_mixture else stem


def _of_shards(reader: ShardReader) -> Iterator[Item]:
    for shard, size in enumerate(reader.shard_sizes):
        for number in range(size):
            try:
                raw = reader.read(shard, number)
                facts = parse_facts(raw)
            except DataError:
                yield Item(f"{reader.manifest.shards[shard].file}/{number}", b"", None)
                continue
            media = reader.manifest.media
            data = next((d for e, d in raw.members.items() if media_kind(e) == media), b"")
            digest = facts.get("sha256")
            digest = digest if isinstance(digest, str) else None
            yield Item(str(facts.get(media, raw.key)), data, digest, tuple(facts["captions"]))


def _sha256(source: Source) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _any_known(vectors: Sequence[npt.NDArray[np.float32] | None]) -> bool:
    return any(vector is not None for vector in vectors)


def _equal(by: str, first: Sequence[str], second: Sequence[str]) -> list[tuple[str, int, int, float]]:
    places: dict[str, list[int]] = {}
    for number, value in enumerate(first):
        places.setdefault(value, []).append(number)
    return [
        (by, one, other, 1.0) for other, value in enumerate(second) if value for one in places.get(value, ())
    ]


def _similar(
    first: Sequence[npt.NDArray[np.float32] | None],
    second: Sequence[npt.NDArray[np.float32] | None],
    minimum: float,
) -> list[tuple[str, int, int, float]]:
    rows = [number for number, vector in enumerate(first) if vector is not None]
    columns = [number for number, vector in enumerate(second) if vector is not None]
    if not rows or not columns:
        return []
    known = _unit(np.stack([vector for vector in first if vector is not None]))
    found = []
    for column in columns:
        cosines = known @ _unit(np.asarray(second[column])[None])[0]
        found += [("embedding", rows[r], column, round(float(cosines[r]), 4))
                  for r in np.flatnonzero(cosines >= minimum).tolist()]  # fmt: skip
    return found


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = vectors / np.maximum(
        np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12
    )
    return unit
