"""Features that somebody else computed, as a model under test.

A ``.npz`` file (no object arrays) holds

- ``video_embeddings`` (videos, e), float; scores are inner products, so cosines need unit rows;
- ``video_ids`` (videos,), text: names of the videos as the annotations have them, with or without extension;
- ``text_embeddings`` (texts, e), float;
- ``texts`` (texts,), text: the queries to the letter, paragraphs joined with single spaces;
- ``num_frames``, one integer: how many frames of a video were seen.

A ``.safetensors`` file holds the two matrices, and in its metadata ``video_ids`` and ``texts`` as JSON lists
and ``num_frames`` as text.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.data.annotations.benchmarks import video_key
from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation.card import file_sha256
from vlm.evaluation.features import TextSet, VideoSet
from vlm.types import Preprocessing, TextFeatures, TokenBatch, VideoFeatures

Floats = NDArray[np.float32]
SUFFIXES = (".npz", ".safetensors")
_MATRICES = ("video_embeddings", "text_embeddings")
_NAMES = ("video_ids", "texts")


class StoredFeatures:
    """Embeddings by name of video and by text, with the surface of a model as far as evaluation needs it."""

    kind = "features"
    domain = "open"
    capabilities = frozenset({"search"})
    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        """Read a features file.

        Raises:
            InvalidInput: It is missing, or is not of the format above.
        """
        try:
            values = _read_npz(path) if path.suffix.lower() == ".npz" else _read_safetensors(path)
            videos, texts = (np.asarray(values[name], np.float32) for name in _MATRICES)
            ids, words = ([str(name) for name in values[name]] for name in _NAMES)
            num_frames = int(values["num_frames"])
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            needed = ", ".join((*_MATRICES, *_NAMES, "num_frames"))
            raise InvalidInput(f"{path}: not a features file, which holds {needed}: {error}") from error
        if videos.ndim != 2 or texts.ndim != 2 or videos.shape[1] != texts.shape[1]:
            raise InvalidInput(
                f"{path}: expected (videos, e) and (texts, e), got {videos.shape} and {texts.shape}"
            )
        if (len(ids), len(words)) != (len(videos), len(texts)):
            raise InvalidInput(
                f"{path}: {len(ids)} names of {len(videos)} videos, {len(words)} texts of {len(texts)} rows"
            )
        if not (np.isfinite(videos).all() and np.isfinite(texts).all()) or num_frames < 1:
            raise InvalidInput(f"{path}: an embedding is not finite, or num_frames is below 1")
        self.name = path.stem
        self.fingerprint = file_sha256(path)
        self.preprocessing = Preprocessing(num_frames=num_frames)
        self._path, self._videos, self._texts = path, videos, texts
        self._video_rows = self._index([video_key(name) for name in ids], "video")
        self._text_rows = self._index(words, "text", repeats=True)

    def video_set(self, clip_ids: Sequence[str]) -> VideoSet:
        """Return the embeddings of clips; those without features are rejected as ``missing``."""
        rows = [self._video_rows.get(video_key(name), -1) for name in clip_ids]
        rejected = [
            (clip, f"missing: no features in {self._path}") for clip, row in enumerate(rows) if row < 0
        ]
        return VideoSet({"": self._videos[rows]}, None, 0.0, rejected)

    def text_set(self, texts: Sequence[str]) -> TextSet:
        """Return the embeddings of queries.

        Raises:
            InvalidInput: A query has none.
        """
        absent = [text for text in texts if text not in self._text_rows]
        if absent:
            raise InvalidInput(
                f"{self._path}: {len(absent)} of {len(texts)} queries have no features, such as {absent[0]!r}"
            )
        return TextSet(self._texts[[self._text_rows[text] for text in texts]], [], [], 0.0)

    @property
    def logit_scale(self) -> float | None:
        """None: nothing is matched."""
        return None

    def unknown_words(self, text: str) -> list[str]:
        """Return nothing: which words the model knew is not in the file."""
        return []

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Raise: there is no model behind a features file."""
        raise CapabilityError(f"{self._path} holds features; it cannot encode a video")

    def encode_text(self, texts: list[str] | TokenBatch) -> TextFeatures:
        """Raise: there is no model behind a features file."""
        raise CapabilityError(f"{self._path} holds features; it cannot encode a text")

    def match(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Raise: there is no model behind a features file."""
        raise CapabilityError(f"{self._path} holds features; it cannot match")

    def _index(self, names: list[str], what: str, repeats: bool = False) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, name in enumerate(names):
            if name in rows and not (repeats and np.array_equal(self._texts[rows[name]], self._texts[row])):
                raise InvalidInput(f"{self._path}: the {what} {name!r} has two rows that differ")
            rows.setdefault(name, row)
        return rows


def _read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values: dict[str, Any] = {name: file.get_tensor(name).float().numpy() for name in _MATRICES}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return {**values, **{name: json.loads(metadata[name]) for name in (*_NAMES, "num_frames")}}
