"""Models known by name: what each is and can do, where it comes from, and where it lies on this machine."""

from __future__ import annotations

from vlm.models.registry.download import download_model, offline_reason
from vlm.models.registry.entries import ModelEntry, ModelFile, PublishedScore, load_registry, lookup
from vlm.models.registry.store import (
    LocalModel,
    find_local,
    import_model,
    list_local,
    local_model,
    remove_model,
    store_folder,
)

__all__ = [
    "LocalModel",
    "ModelEntry",
    "ModelFile",
    "PublishedScore",
    "download_model",
    "find_local",
    "import_model",
    "list_local",
    "load_registry",
    "local_model",
    "lookup",
    "offline_reason",
    "remove_model",
    "store_folder",
]
