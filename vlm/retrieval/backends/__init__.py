"""Nearest vectors by inner product: one interface, `exact` the truth, others measured against it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.errors import InvalidInput, MissingExtra
from vlm.retrieval.backends.exact import Backend, ExactBackend, VectorSource

BackendName = Literal["auto", "exact", "faiss"]

__all__ = ["Backend", "BackendName", "ExactBackend", "VectorSource", "is_outgrown", "open_backend"]


def open_backend(
    name: str,
    vectors: VectorSource,
    cache: Path,
    texts: Callable[[], np.ndarray] | None = None,
    known: Backend | None = None,
) -> Backend:
    """Return a backend over some vectors.

    Args:
        name: ``exact``, ``faiss``, or ``auto``: FAISS if installed.
        vectors: What is searched.
        cache: Folder for structures that can be rebuilt from the vectors.
        texts: Returns embedded texts (texts, dim); called when a structure is built that is not exact, to
            measure what it finds.
        known: A backend of earlier rows of the same vectors, whose structure is copied and goes on to serve,
            even if it `is_outgrown`.

    Raises:
        InvalidInput: The name is unknown.
        MissingExtra: FAISS was asked for and is not installed.
    """
    if name not in ("auto", "exact", "faiss"):
        raise InvalidInput(f"expected backend auto, exact or faiss, got {name!r}")
    has_faiss = importlib.util.find_spec("faiss") is not None
    if name == "exact" or (name == "auto" and not has_faiss):
        return ExactBackend(vectors)
    if not has_faiss:
        raise MissingExtra("faiss", "faiss-cpu", "the faiss backend")
    from vlm.retrieval.backends.structured import FaissBackend

    return FaissBackend(vectors, cache, texts=texts, known=known if isinstance(known, FaissBackend) else None)


def is_outgrown(backend: Backend) -> bool:
    """Whether a backend should be opened anew, without an earlier one: it would train or measure."""
    return getattr(backend, "is_outgrown", False)
