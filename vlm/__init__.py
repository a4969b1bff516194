"""Video-language retrieval and question answering with a state-space video encoder.

Importing this package is cheap: the public names below are loaded at first use, so that programs which
need only one part (the scan, the metrics, the command line's help) do not pay for the others.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "Client": "vlm.serving.client",
    "Searcher": "vlm.retrieval",
    "VideoIndex": "vlm.retrieval",
    "load_model": "vlm.models",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
