"""Features of videos on disk: one file a video, found by what made it, so that a run goes on where it was.

``CACHE/<key>/<first two digits>/<sha256 of the video>.npz``; the key is a hash of the model, its
preprocessing and how frames are chosen, which ``CACHE/<key>/key.json`` spells out. A file appears whole or
not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.config import to_dict
from vlm.errors import IntegrityError, InvalidInput
from vlm.retrieval.durability import hash_file, write_bytes_durably
from vlm.types import VideoTextEncoder

Floats = NDArray[np.float32]
FORMAT = "vlm-features/1"
TOKENS = "tokens"


class FeatureCache:
    """Features of one model under one way of choosing frames.

    Attributes:
        folder: Where its files lie.
    """

    def __init__(self, root: Path, model: VideoTextEncoder, choice: Mapping[str, Any]) -> None:
        """Open or begin a cache.

        Args:
            root: Folder of all caches.
            model: Whose features they are.
            choice: How frames are chosen, JSON values.

        Raises:
            InvalidInput: The model has no fingerprint, so nothing tells its features from another's.
        """
        if not model.fingerprint:
            raise InvalidInput(
                f"model {model.name!r} has no fingerprint, so its features cannot be kept; give it one, a "
                "text that changes with its weights, or leave the cache out"
            )
        made_by = {
            "format": FORMAT,
            "model": model.fingerprint,
            "preprocessing": to_dict(model.preprocessing),
            "frames": dict(choice),
        }
        text = json.dumps(made_by, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            write_bytes_durably(self.folder / "key.json", (text + "\n").encode())

    def digest(self, video: Path) -> str:
        """Return the hash of a video's bytes, by which its features are found under any name."""
        return hash_file(video)

    def read(self, digest: str, names: Iterable[str]) -> dict[str, Floats] | None:
        """Return the named features of a video; None if one is not there or the file is damaged."""
        try:
            with self._path(digest).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                found = {name: np.asarray(file[name], np.float32) for name in names}
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        return found

    def write(self, digest: str, features: Mapping[str, Floats]) -> None:
        """Add features of a video to those that are there.

        Raises:
            NoSpaceError: The disk is full; what was there stays.
        """
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        merged = {**(self._all(path) or {}), **features}
        content = io.BytesIO()
        np.savez(content, **merged)  # type: ignore[arg-type]  # names are keys, whatever they are
        write_bytes_durably(path, content.getvalue())

    def _all(self, path: Path) -> dict[str, Floats] | None:
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.npz"


class CachedTokens:
    """Token features (videos, n, d) that stay on disk and are read block by block.

    Attributes:
        shape: (videos, n, d).
    """

    def __init__(self, cache: FeatureCache, digests: Sequence[str | None]) -> None:
        """Take the hash of each video; None for one that could not be read, whose rows are zero."""
        self._cache, self._digests = cache, tuple(digests)
        first = next(digest for digest in digests if digest is not None)
        self.shape = (len(digests), *self._read(first).shape)

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, rows: slice) -> Floats:
        """Return a block (videos, n, d) float32, read now.

        Raises:
            IntegrityError: A file was removed or damaged since the videos were encoded.
        """
        chosen = self._digests[rows]
        block = np.zeros((len(chosen), *self.shape[1:]), np.float32)
        for place, digest in enumerate(chosen):
            if digest is not None:
                block[place] = self._read(digest)
        return block

    def keep(self, rows: Iterable[int]) -> CachedTokens:
        """Return the tokens of some videos."""
        return CachedTokens(self._cache, [self._digests[row] for row in rows])

    def _read(self, digest: str) -> Floats:
        found = self._cache.read(digest, (TOKENS,))
        if found is None:
            raise IntegrityError(
                f"{self._cache.folder}: the features of {digest} vanished or were damaged while "
                "they were used; run the same command again, which encodes them anew"
            )
        return found[TOKENS]
