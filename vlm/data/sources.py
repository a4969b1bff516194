"""Where samples come from: anything that loads one by number; here, shards and labelled video files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlm.data.annotations.labels import LabelledSet
from vlm.data.decoding import DecodeLimits, open_video, read_picture
from vlm.data.shards.layout import Media, media_kind
from vlm.data.shards.reader import RawSample, ShardReader
from vlm.data.shards.remote import CacheConfig
from vlm.errors import DataError

# (frames available) -> (t,) indices of those to decode
FrameChooser = Callable[[int], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A clip with what is said of it.

    Attributes:
        key: Its name, unique in its source.
        frames: (t, h, w, 3) uint8 RGB, as displayed.
        captions: At least one.
        origin: Which of several sources it comes from; empty where there is one only.
        metadata: What else is known, such as a rendered clip's scene.
    """

    key: str
    origin: str = ""
    frames: npt.NDArray[np.uint8]
    captions: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


class SampleSource(Protocol):
    """Samples in parts (shards), loaded in any order; picklable, and usable from many threads."""

    @property
    def fingerprint(self) -> str:
        """Hash of the contents, in hex; the order of samples follows from it."""

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each part; parts are the unit of shuffling."""

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        """Load one sample, or raise DataError with a countable reason."""

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        """Return where a sample lies, for the list of rejected ones; never raises DataError."""


class ShardSource:
    """The samples of a folder of shards, a path or a URL, decoded as they are loaded; see `ShardReader`."""

    def __init__(
        self, folder: Path | str, limits: DecodeLimits | None = None, cache: CacheConfig | None = None
    ) -> None:
        self._reader = ShardReader(folder, cache)
        self._limits = limits or DecodeLimits(max_seconds=60.0)

    @property
    def fingerprint(self) -> str:
        """Hash of all shards."""
        return self._reader.manifest.fingerprint

    @property
    def media(self) -> Media:
        """Whether the samples are videos or pictures."""
        return self._reader.manifest.media

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that samples are labelled with; empty without labels."""
        return self._reader.manifest.classes

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return self._reader.shard_sizes

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        """Read, verify and decode one sample; a picture is a clip of one frame.

        Raises:
            DataError: Reading failed (`ShardReader.read`), decoding failed (`open_video`, `read_picture`), or
                the sample lacks its video or picture (``no_video_member``, ``no_picture_member``) or captions
                (``bad_metadata``).
        """
        raw = self._reader.read(shard, number)
        facts = parse_facts(raw)
        data = media_member(raw, self.media)
        if self.media == "image":
            frames = read_picture(data, self._limits).frame[None][choose(1)]
        else:
            video = open_video(data, self._limits)
            frames = video.read(choose(video.info.num_frames))
        metadata = dict(facts.get("metadata", {}))
        if "label" in facts:
            metadata["label"] = facts["label"]
        return Sample(key=raw.key, frames=frames, captions=tuple(facts["captions"]), metadata=metadata)

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        """Return shard, key, offset and checksum of a sample, as far as the index can be read."""
        place: dict[str, Any] = {"shard": self._reader.manifest.shards[shard].file, "number": number}
        try:
            entry = self._reader.entry(shard, number)
        except DataError:
            return place
        first = entry.members[0]
        return {**place, "key": entry.key, "offset": first.offset, "blake2b": first.blake2b}


class LabelledShards:
    """The samples of shards that were packed with labels; ``metadata["label"]`` is the number of the class.

    Args:
        source: The shards.
        classes: Names of the classes in the order of their numbers; None takes the shards' own.

    Raises:
        DataError: The samples have no labels (``no_labels``), or a class that is none of ``classes``
            (``bad_annotations``).
    """

    def __init__(self, source: ShardSource, classes: Sequence[str] | None = None) -> None:
        if not source.classes:
            raise DataError(
                "the shards hold no labels; pack them with vlm data pack --layout, see vlm data pack --help",
                "no_labels",
            )
        self.classes = source.classes if classes is None else tuple(classes)
        unknown = sorted(set(source.classes) - set(self.classes))
        if unknown:
            raise DataError(
                f"the shards know the class {unknown[0]!r}, which is none of the {len(self.classes)} classes",
                "bad_annotations",
            )
        self.media = source.media
        self._source = source
        self._numbers = [self.classes.index(name) for name in source.classes]

    @property
    def fingerprint(self) -> str:
        """Hash of all shards."""
        return self._source.fingerprint

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return self._source.shard_sizes

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        """Load one sample.

        Raises:
            DataError: It has no label (``bad_metadata``), or loading failed.
        """
        sample = self._source.load(shard, number, choose)
        label = sample.metadata.get("label")
        if type(label) is not int or not 0 <= label < len(self._numbers):
            raise DataError(
                f"{sample.key}: expected a label below {len(self._numbers)}, got {label!r}", "bad_metadata"
            )
        return replace(sample, metadata={**sample.metadata, "label": self._numbers[label]})

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        """Return where a sample lies."""
        return self._source.locate(shard, number)


class LabelledVideos:
    """Video files with a class each: its name is the caption, its number ``metadata["label"]``."""

    def __init__(self, data: LabelledSet, limits: DecodeLimits | None = None) -> None:
        self._data = data
        self.classes = data.classes
        self.media: Media = "video"
        self._limits = limits or DecodeLimits(max_seconds=60.0)

    @property
    def fingerprint(self) -> str:
        """Hash of the names and labels, not of the files."""
        rows = zip(self._data.names, self._data.labels, strict=True)
        return hashlib.sha256("".join(f"{label} {name}\n" for name, label in rows).encode()).hexdigest()

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """All videos, as one part."""
        return (len(self._data.names),)

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        """Decode one video.

        Raises:
            DataError: There is no such file (``missing``, ``unsafe_name``), or decoding failed.
        """
        path, label = self._data.paths[number], self._data.labels[number]
        if path is None:
            raise DataError(f"{self._data.names[number]}: no such video", self._data.reasons[number])
        video = open_video(path, self._limits)
        return Sample(
            key=self._data.names[number],
            frames=video.read(choose(video.info.num_frames)),
            captions=(self._data.classes[label],),
            metadata={"label": label},
        )

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        """Return the name of a video."""
        return {"video": self._data.names[number]}


def media_member(raw: RawSample, media: Media) -> bytes:
    """Return the video, or the picture, of a sample.

    Raises:
        DataError: There is none, or several (``no_video_member``, ``no_picture_member``).
    """
    found = [data for extension, data in raw.members.items() if media_kind(extension) == media]
    if len(found) != 1:
        noun = "picture" if media == "image" else "video"
        raise DataError(f"{raw.key}: expected one {noun} member, got {len(found)}", f"no_{noun}_member")
    return found[0]


def parse_facts(raw: RawSample) -> dict[str, Any]:
    """Return what is said of a sample; ``captions`` holds at least one text.

    Captions come from ``captions``, ``caption`` or ``text`` of the ``json`` member, or else are the ``txt``
    member.

    Raises:
        DataError: ``bad_metadata``; ``no_caption`` if nothing is damaged, but nothing is said either.
    """
    try:
        facts = json.loads(raw.members["json"]) if "json" in raw.members else {}
        said = next((facts[name] for name in ("captions", "caption", "text") if facts.get(name)), None)
        if said is None:
            said = raw.members.get("txt", b"").decode("utf-8").strip() or []
        captions = [said] if isinstance(said, str) else said
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError("captions must be a list of text")
        if not isinstance(facts.get("metadata", {}), dict):
            raise TypeError("metadata must be an object")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{raw.key}: no usable captions: {error!r}", "bad_metadata") from error
    if not captions:
        raise DataError(f"{raw.key}: no caption belongs to this sample", "no_caption")
    return {**facts, "captions": captions}
