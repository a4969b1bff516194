"""Videos and captions into batches: decoding, sampling, preprocessing, shards, loading."""

from __future__ import annotations

from vlm.data.preprocessing import preprocess

__all__ = ["preprocess"]
