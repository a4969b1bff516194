"""Any Python object that encodes videos and texts, as a model under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.errors import CapabilityError
from vlm.models.video_model import mean_of_directions
from vlm.types import Preprocessing, TextFeatures, TokenBatch, VideoFeatures, VideoTextEncoder


def wrap_encoder(
    encoder: Any,
    *,
    preprocessing: Preprocessing,
    name: str = "",
    fingerprint: str = "",
    domain: str = "open",
    device: str | torch.device | None = None,
) -> VideoTextEncoder:
    """Return an object with two methods as a model that can be evaluated.

    ``encoder.encode_video`` gets (b, t, 3, s, s) float32 made by ``preprocessing`` and returns an embedding
    of each video (b, e), of each frame (b, t, e), or ``VideoFeatures``. ``encoder.encode_text`` gets a list
    of texts and returns (b, e) or ``TextFeatures``. Arrays are taken as well as tensors. Embeddings (b, e)
    are scaled to length 1; of frames the mean of their directions is taken. If the object also has ``match``,
    both methods must return features with tokens, and the matching head is measured too; with a number
    ``logit_scale`` (1 / temperature of the loss beside the head) also head and embedding together. With
    ``count_cut`` (texts → how many are longer than it reads) the card says how many queries were cut.

    Args:
        encoder: The object.
        preprocessing: How its input is made.
        name: For the card; the class's name by default.
        fingerprint: A text that changes with the weights; without one its features cannot be kept on disk.
        domain: What the model knows.
        device: Where its input goes; where its parameters are by default, else the CPU.

    Raises:
        ValueError: A method is missing.
    """
    for method in ("encode_video", "encode_text"):
        if not callable(getattr(encoder, method, None)):
            raise ValueError(f"expected an object with the method {method}, got {type(encoder).__name__}")
    return _Wrapped(encoder, preprocessing, name or type(encoder).__name__, fingerprint, domain, device)


class _Wrapped:
    kind = "object"

    def __init__(
        self,
        encoder: Any,
        preprocessing: Preprocessing,
        name: str,
        fingerprint: str,
        domain: str,
        device: str | torch.device | None,
    ) -> None:
        self._encoder = encoder
        self.preprocessing, self.name, self.fingerprint, self.domain = (
            preprocessing,
            name,
            fingerprint,
            domain,
        )
        can_match = callable(getattr(encoder, "match", None))
        self.capabilities = frozenset({"search", "rerank"} if can_match else {"search"})
        scale = getattr(encoder, "logit_scale", None) if can_match else None
        # CLIP's models hold its logarithm under this name, as a tensor
        self.logit_scale = float(scale) if isinstance(scale, int | float) else None
        first = next(iter(encoder.parameters()), None) if isinstance(encoder, torch.nn.Module) else None
        own = first.device if first is not None else torch.device("cpu")
        self.device = own if device is None else torch.device(device)

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Return the object's features of videos (b, t, 3, s, s)."""
        output = self._encoder.encode_video(video)
        if isinstance(output, VideoFeatures):
            return output
        rows = _rows(output, len(video), (2, 3), "encode_video")
        frames = rows if rows.ndim == 3 else rows[:, None]
        return VideoFeatures(frames, frames, mean_of_directions(frames))

    def encode_text(self, texts: list[str] | TokenBatch) -> TextFeatures:
        """Return the object's features of texts."""
        if isinstance(texts, TokenBatch):
            raise ValueError("an object encodes texts, not token ids")
        output = self._encoder.encode_text(texts)
        if isinstance(output, TextFeatures):
            return output
        rows = _rows(output, len(texts), (2,), "encode_text")
        mask = torch.ones(len(rows), 1, dtype=torch.int64)
        return TextFeatures(rows[:, None], mask, F.normalize(rows, dim=-1))

    def match(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the object's matching logits (pairs, 2)."""
        if "rerank" not in self.capabilities:
            raise CapabilityError(f"{self.name!r} has no method match")
        logits: Tensor = self._encoder.match(video_tokens, text_tokens, mask)
        return logits

    def count_cut(self, texts: Sequence[str]) -> int | None:
        """Return how many texts are longer than the object reads; None if it does not say."""
        say = getattr(self._encoder, "count_cut", None)
        return int(say(texts)) if callable(say) else None

    def unknown_words(self, text: str) -> list[str]:
        """Return what the object says, nothing if it does not say."""
        say = getattr(self._encoder, "unknown_words", None)
        return list(say(text)) if callable(say) else []


def _rows(output: Any, count: int, dimensions: tuple[int, ...], method: str) -> Tensor:
    rows = torch.as_tensor(output).float()
    if rows.ndim not in dimensions or len(rows) != count:
        raise ValueError(f"{method} must return {count} rows, got the shape {tuple(rows.shape)}")
    return rows
