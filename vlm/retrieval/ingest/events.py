"""What is asked of the decoders, and what they tell of each file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm.retrieval.segments import Segmentation
from vlm.types import Preprocessing

CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How files become segments.

    Attributes:
        preprocessing: The model's.
        segment_s: Length of a segment.
        stride_s: From one segment's start to the next.
        segmentation: ``shots`` cuts where one shot ends and another begins, and each shot evenly.
        grid_step_s: Seconds between the frames of a file that its segments share, each sent once; None gives
            each segment frames of its own.
        patience_s: Longest time that opening a file, or the next segment, may take.
        num_workers: Processes that decode at the same time.
        only_open: Read the files' facts, but no frames.
        ahead_bytes: Decoded frames that may wait for the encoder, over all workers; by default some 100
            segments of 8 frames of 224 x 224.
        decode_with: ``cpu``, or the name of a `vlm.data.decoding.Device` that decodes what it can.
    """

    preprocessing: Preprocessing
    segment_s: float = 8.0
    stride_s: float = 4.0
    segmentation: Segmentation = "even"
    grid_step_s: float | None = None
    patience_s: float = 60.0
    num_workers: int = 1
    only_open: bool = False
    ahead_bytes: int = 512 << 20
    decode_with: str = CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A file is a video: `segments` are (start_s, end_s), `fps` its mean rate, `tags` its metadata."""

    file: int
    duration_s: float
    width: int
    height: int
    codec: str
    fps: float
    tags: dict[str, str]
    segments: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedSegment:
    """Segment `number` of a file.

    Attributes:
        video: (frames, 3, height, width) float32, preprocessed; of a grid, those that come for the first
            time, which may be none.
        hashes: (frames,) uint64, how each of its frames looks.
        shown: (frames,) int64, ascending: which of all frames that came of the file, counted from 0, are its
            own; None if they are those of `video`.
    """

    file: int
    number: int
    video: np.ndarray
    hashes: np.ndarray
    shown: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """All segments of a file have come; size and hash are those of the bytes that were decoded.

    `fallback` says why the CPU decoded frames of it though a device was to: as of `Video`, or ``device_lost``
    (it could not be opened again), ``decoder_crashed`` or ``timeout`` (it took its process down).
    """

    file: int
    size_bytes: int
    mtime_ns: int
    sha256: str
    fallback: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A file cannot be decoded: a short countable reason, and a sentence."""

    file: int
    reason: str
    detail: str


Event = Opened | DecodedSegment | Finished | Failed
