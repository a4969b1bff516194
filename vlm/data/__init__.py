"""Videos and captions into batches: decoding, sampling, preprocessing, shards, loading."""

from __future__ import annotations

from vlm.data.collate import Clip, ClipBatch, collate, true_pairs
from vlm.data.decoding import VideoInfo, iter_segments, open_video, probe, read_frames
from vlm.data.loader import Loader, LoaderConfig
from vlm.data.mixture import Mixture
from vlm.data.preprocessing import preprocess
from vlm.data.sources import Sample, SampleSource, ShardSource

__all__ = [
    "Clip",
    "ClipBatch",
    "Loader",
    "LoaderConfig",
    "Mixture",
    "Sample",
    "SampleSource",
    "ShardSource",
    "VideoInfo",
    "collate",
    "iter_segments",
    "open_video",
    "preprocess",
    "probe",
    "read_frames",
    "true_pairs",
]
