"""The model that is none: videos are known by what is written about them, and by how their frames look."""

from __future__ import annotations

import torch

from vlm.errors import CapabilityError
from vlm.retrieval.words.search import NO_MODEL
from vlm.types import Preprocessing, TextFeatures, TokenBatch, VideoFeatures, VideoTextEncoder

NAME = NO_MODEL


class NoModel:
    """Stands where a model does; every vector of its is one zero."""

    name = kind = NAME
    domain = "open"
    capabilities = frozenset({"search"})
    fingerprint = NAME
    # as many frames as a model sees; hashes need no more pixels
    preprocessing = Preprocessing(num_frames=8, image_size=64)
    device = torch.device("cpu")

    def encode_video(self, video: torch.Tensor) -> VideoFeatures:
        """Return zeros."""
        count = len(video)
        return VideoFeatures(torch.zeros(count, 1, 1), torch.zeros(count, 1, 1), torch.zeros(count, 1))

    def encode_text(self, texts: list[str] | TokenBatch) -> TextFeatures:
        """Return zeros."""
        count = len(texts)
        mask = torch.ones(count, 1, dtype=torch.int64)
        return TextFeatures(torch.zeros(count, 1, 1), mask, torch.zeros(count, 1))

    @property
    def logit_scale(self) -> float | None:
        """None: nothing is matched."""
        return None

    def unknown_words(self, text: str) -> list[str]:
        """Return nothing: words are looked for as they are written."""
        return []

    def match(
        self, video_tokens: torch.Tensor, text_tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Refuse."""
        raise CapabilityError("an index without a model cannot rerank")


def load_encoder(source: str) -> VideoTextEncoder:
    """Return the model of an index, which may be none."""
    if source == NAME:
        return NoModel()
    from vlm.models import load_model

    return load_model(source)
