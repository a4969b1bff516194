"""Videos and captions into batches: decoding, sampling, preprocessing, shards, loading.

The names are loaded at first use, so that a process that only decodes does without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.data.collate import Clip, ClipBatch, make_batch, true_pairs
    from vlm.data.decoding import VideoInfo, iter_segments, open_video, probe, read_frames
    from vlm.data.loader import Loader
    from vlm.data.mixture import Corpus, Mixture
    from vlm.data.preparation import LoaderConfig
    from vlm.data.preprocessing import preprocess
    from vlm.data.sources import Sample, SampleSource, ShardSource

__all__ = [
    "Clip",
    "ClipBatch",
    "Corpus",
    "Loader",
    "LoaderConfig",
    "Mixture",
    "Sample",
    "SampleSource",
    "ShardSource",
    "VideoInfo",
    "iter_segments",
    "make_batch",
    "open_video",
    "preprocess",
    "probe",
    "read_frames",
    "true_pairs",
]

_MODULES = {
    "collate": ("Clip", "ClipBatch", "make_batch", "true_pairs"),
    "decoding": ("VideoInfo", "iter_segments", "open_video", "probe", "read_frames"),
    "loader": ("Loader",),
    "mixture": ("Corpus", "Mixture"),
    "preparation": ("LoaderConfig",),
    "preprocessing": ("preprocess",),
    "sources": ("Sample", "SampleSource", "ShardSource"),
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'vlm.data' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"vlm.data.{module}"), name)
