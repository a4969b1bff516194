"""Videos and captions into batches: decoding, sampling, preprocessing, shards, loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.data.preprocessing import preprocess

__all__ = ["preprocess"]


def __getattr__(name: str) -> Any:
    """Load `preprocess` when asked for: processes that only decode do without torch."""
    if name != "preprocess":
        raise AttributeError(f"module 'vlm.data' has no attribute {name!r}")
    from vlm.data.preprocessing import preprocess

    return preprocess
