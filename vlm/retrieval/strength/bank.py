"""The background bank of a model: unrelated texts, encoded once."""

from __future__ import annotations

import hashlib
import threading

import numpy as np

from vlm.retrieval.strength.unrelated import texts_for
from vlm.types import TextFeatures, VideoTextEncoder

_TEXTS_AT_ONCE = 32
# what a calibration says of the matching head; one that says something else is made again
_HEAD = "head and embedding together"


class TextBank:
    """Unrelated texts of a model's domain and, once asked for, what the model makes of them.

    Args:
        model: Who encodes them.
        texts: Other texts than those of the model's domain.
    """

    def __init__(self, model: VideoTextEncoder, texts: tuple[str, ...] | None = None) -> None:
        self._model = model
        self.texts = texts_for(model.domain) if texts is None else texts
        self._embeddings: np.ndarray | None = None
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """Hash of the texts and of who encodes them."""
        return hashlib.sha256("\n".join((self._model.fingerprint, _HEAD, *self.texts)).encode()).hexdigest()

    def embeddings(self) -> np.ndarray:
        """Return (texts, dim) float32; the first call runs the model."""
        import torch

        with self._lock:
            if self._embeddings is None:
                with torch.inference_mode():
                    parts = [
                        self._model.encode_text(list(self.texts[first : first + _TEXTS_AT_ONCE])).embedding
                        for first in range(0, len(self.texts), _TEXTS_AT_ONCE)
                    ]
                    self._embeddings = torch.cat(parts).float().cpu().numpy()
            return self._embeddings

    def features(self, number: int) -> TextFeatures:
        """Return one text as the matching head reads it."""
        import torch

        with torch.inference_mode():
            return self._model.encode_text([self.texts[number]])
