"""Videos, pictures and captions into shards: every item is packed or rejected with its reason, in order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.annotations import Annotation, Located, locate_videos
from vlm.data.decoding import DecodeLimits, Picture, VideoInfo, open_video, read_picture
from vlm.data.frame_sampling import middle_frames
from vlm.data.reencoding import Reencoding, reencode
from vlm.data.shards.layout import (
    MANIFEST,
    VIDEO_EXTENSIONS,
    Manifest,
    Media,
    make_keys,
    read_manifest,
)
from vlm.data.shards.writer import ShardWriter
from vlm.errors import DataError, InvalidInput
from vlm.progress import progress_bar

_FRAMES_TRIED = 8
_MAX_FILE_BYTES = 2 << 30
_CHECK_S, _REENCODE_S = 120.0, 3600.0
_BY_CODEC = {"mjpeg": "jpg"}
_BY_CONTAINER = {"matroska": "mkv", "mpegts": "ts", "mpeg": "mpg", "ogg": "ogv"}


@dataclass(frozen=True, slots=True)
class _Packed:
    """A video or picture ready for the writer."""

    key: str
    members: dict[str, bytes]
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Rejected:
    item: str
    reason: str
    detail: str


def pack(
    annotations: Sequence[Annotation],
    videos: Path,
    out: Path,
    *,
    max_shard_bytes: int = 256 << 20,
    workers: int = 2,
    reencoding: Reencoding | None = None,
    media: Media = "video",
    classes: Sequence[str] = (),
) -> Manifest:
    """Pack the annotated videos or pictures of a folder into shards; continue if an earlier run was stopped.

    Each video is opened and eight of its frames decoded before it is taken as it is; one that is encoded
    anew is decoded whole, and so is every picture. The same input gives the same bytes, however often the
    work is interrupted and however many workers there are.

    Args:
        annotations: What to pack, in this order; one entry a video.
        videos: Folder that the names of the videos are relative to.
        out: Folder for the shards.
        max_shard_bytes: Size that a shard does not exceed, unless one video does.
        workers: Threads that read and check videos.
        reencoding: How each video is encoded anew; None packs the files as they are.
        media: What the files are; one of the other media is rejected.
        classes: Names of the classes that annotations are labelled with.

    Returns:
        The manifest: counts, hashes, and each rejected item with its reason.

    Raises:
        InvalidInput: Nothing is left to pack, or ``out`` holds something else, or shards of the same input
            from when files were missing that are there now.
        ValueError: Pictures cannot be encoded anew.
    """
    if media == "image" and reencoding is not None:
        raise ValueError("expected videos to encode anew, got pictures")
    if not annotations:
        raise InvalidInput(f"{videos}: no annotated video to pack")
    located = locate_videos(annotations, videos, media)
    identity = _identity(annotations, reencoding, media, classes)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest.input == {**identity, "max_bytes": max_shard_bytes}:
            _check_still_missing(manifest, located, out)
            return manifest
        raise InvalidInput(f"{out}: already holds shards of another input; choose another --out")
    writer = ShardWriter(out, identity, max_shard_bytes, media=media, classes=classes)
    check = partial(_check, media=media, reencoding=reencoding)
    keys = make_keys([entry.video for entry in annotations])
    with progress_bar(len(located), "packing", media, initial=writer.num_done) as bar:
        for result in _check_all(located, keys, writer.num_done, workers, check):
            if isinstance(result, _Packed):
                writer.add(result.key, result.members, result.duration_s)
            else:
                writer.reject(result.item, result.reason, result.detail)
            bar.update()
    return writer.finish()


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return the counts of a folder of shards, ready for JSON."""
    return {
        "media": manifest.media,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "num_bytes": manifest.num_bytes,
        "duration_s": manifest.duration_s,
        "num_rejected": len(manifest.rejected),
        "rejected_by_reason": dict(Counter(item.reason for item in manifest.rejected).most_common()),
        "num_odd": len(manifest.odd),
        "odd_by_reason": dict(Counter(item.reason for item in manifest.odd).most_common()),
        "rejected": [asdict(item) for item in manifest.rejected],
        "fingerprint": manifest.fingerprint,
    }


def _check_still_missing(manifest: Manifest, located: Sequence[Located], out: Path) -> None:
    """Refuse shards of which a file was missing that is there now: what is packed is never changed."""
    there = {entry.annotation.video for entry in located if entry.path is not None}
    added = [item.item for item in manifest.rejected if item.reason == "missing" and item.item in there]
    if added:
        raise InvalidInput(
            f"{out}: was packed while {len(added)} files were missing that are there now, such as "
            f"{added[0]!a}; choose another --out, or remove {out} to pack all anew"
        )


def _check_all(
    located: Sequence[Located],
    keys: Sequence[str],
    start: int,
    workers: int,
    check: Callable[[Located, str], _Packed | _Rejected],
) -> Iterator[_Packed | _Rejected]:
    """Check videos in threads, a few ahead, and yield the results in order."""
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="vlm-pack") as pool:
        ahead = 2 * max(workers, 1)
        pending: deque[Future[_Packed | _Rejected]] = deque()
        try:
            for number in range(start, len(located)):
                while len(pending) < ahead and number + len(pending) < len(located):
                    following = number + len(pending)
                    pending.append(pool.submit(check, located[following], keys[following]))
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _check(item: Located, key: str, *, media: Media, reencoding: Reencoding | None) -> _Packed | _Rejected:
    """Read one file, try to decode it, and lay out its members."""
    name = item.annotation.video
    if item.path is None:
        detail = f"no such {media} file" if item.reason == "missing" else "the name leaves the folder"
        return _Rejected(name, item.reason, detail)
    if not item.annotation.captions:
        return _Rejected(name, "no_caption", f"no caption belongs to this {media}")
    try:
        if item.path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{item.path}: larger than {_MAX_FILE_BYTES} bytes", "too_large")
        data = item.path.read_bytes()
        facts: dict[str, Any] = {media: name, "sha256": hashlib.sha256(data).hexdigest()}
        duration_s = 0.0
        if media == "image":
            picture = check_picture(data)
            extension = _BY_CODEC.get(picture.codec, picture.codec)
            facts |= _picture_facts(picture)
        else:
            if reencoding is None:
                info = check_video(data)
                extension = _extension(item.path, info)
            else:
                data, info, facts["original"] = _reencoded(data, reencoding)
                extension = "mp4"
            facts |= _video_facts(info)
            duration_s = info.duration_s
    except DataError as error:
        return _Rejected(name, error.reason, str(error))
    except OSError as error:
        return _Rejected(name, "unreadable", str(error))
    facts |= {"captions": list(item.annotation.captions), "metadata": item.annotation.metadata}
    if item.annotation.label is not None:
        facts["label"] = item.annotation.label
    members = {
        extension: data,
        "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"),
        "txt": item.annotation.captions[0].encode("utf-8", "replace"),
    }
    return _Packed(key, members, duration_s)


def check_video(data: bytes) -> VideoInfo:
    """Open a video and decode eight frames spread over it.

    Raises:
        DataError: It cannot be opened, or a frame cannot be decoded; see `open_video`.
    """
    video = open_video(data, DecodeLimits(max_seconds=_CHECK_S))
    for _ in video.iterate(np.unique(middle_frames(video.info.num_frames, _FRAMES_TRIED))):
        pass
    return video.info


def check_picture(data: bytes) -> Picture:
    """Decode a picture.

    Raises:
        DataError: It cannot be decoded whole; see `read_picture`.
    """
    return read_picture(data, DecodeLimits(max_seconds=_CHECK_S))


def _reencoded(data: bytes, how: Reencoding) -> tuple[bytes, VideoInfo, dict[str, Any]]:
    """Return the new file, what it is, and what the old one was."""
    video = open_video(data, DecodeLimits(max_seconds=_REENCODE_S))
    made = reencode(video, how)
    info = check_video(made)
    if info.num_frames != video.info.num_frames:
        raise DataError(
            f"{video.info.num_frames} frames became {info.num_frames} when encoded anew", "reencode_failed"
        )
    old = video.info
    return made, info, {"width": old.width, "height": old.height, "codec": old.codec, "size_bytes": len(data)}


def _video_facts(info: VideoInfo) -> dict[str, Any]:
    return {
        "duration_s": round(info.duration_s, 6),
        "num_frames": info.num_frames,
        "fps": round(info.fps, 6),
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
    }


def _picture_facts(picture: Picture) -> dict[str, Any]:
    height, width = picture.frame.shape[:2]
    return {"width": width, "height": height, "codec": picture.codec}


def _extension(path: Path, info: VideoInfo) -> str:
    """Return the file's extension, or the container's where the name has none that readers know."""
    extension = path.suffix[1:].lower()
    if extension in VIDEO_EXTENSIONS:
        return extension
    container = info.container.partition(",")[0]
    guess = "mp4" if container == "mov" else _BY_CONTAINER.get(container, container)
    return guess if guess in VIDEO_EXTENSIONS else "video"


def _identity(
    annotations: Sequence[Annotation], reencoding: Reencoding | None, media: Media, classes: Sequence[str]
) -> dict[str, Any]:
    """Return what decides the contents of the shards; what is usual is not said."""
    identity: dict[str, Any] = {"annotations": _hash(annotations), "num_items": len(annotations)}
    if reencoding is not None:
        identity["reencoding"] = asdict(reencoding)
    if media != "video":
        identity["media"] = media
    if classes:
        identity["classes"] = list(classes)
    return identity


def _hash(annotations: Sequence[Annotation]) -> str:
    rows = [
        [entry.video, entry.captions, entry.metadata, *([] if entry.label is None else [entry.label])]
        for entry in annotations
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
