"""Find the moment: segments of videos in a crash-proof index, searched by text, image or video."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Mix": "vlm.retrieval.queries.values",
    "Moment": "vlm.retrieval.queries.values",
    "Part": "vlm.retrieval.queries.values",
    "Report": "vlm.retrieval.reports",
    "Searcher": "vlm.retrieval.searcher",
    "VideoIndex": "vlm.retrieval.index",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vlm.retrieval' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
