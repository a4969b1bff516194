"""What every model offers, and the error for what a kind of model lacks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import CapabilityError
from vlm.types import Answer, Preprocessing, TextFeatures, TokenBatch, VideoFeatures

ABILITIES = frozenset({"search", "rerank", "choose", "answer", "when", "classify"})


class VideoModel(nn.Module):
    """The common surface of all models; each kind overrides what it can do.

    Attributes:
        kind: ``video-text``, ``classifier``, ``encoder`` or ``frames``.
        name: Short name for reports.
        domain: What the model knows: ``open``, or a narrow world such as ``digit-world``.
        capabilities: A subset of ``ABILITIES``.
        preprocessing: How its input is made.
        config: The dataclass that it was built from.
        loaded: What reading its weights did, JSON values: the file's name, ``sha256`` and ``form``, how many
            names matched, and which were missing, unexpected, resized or ignored; empty for a model that was
            built in memory.
    """

    kind: ClassVar[str] = "abstract"
    default_capabilities: ClassVar[frozenset[str]] = frozenset()
    config: Any

    def __init__(
        self,
        *,
        preprocessing: Preprocessing,
        name: str = "unnamed",
        domain: str = "open",
        capabilities: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        abilities = self.default_capabilities if capabilities is None else frozenset(capabilities)
        if not abilities <= ABILITIES:
            raise ValueError(
                f"capabilities must be among {sorted(ABILITIES)}, got {sorted(abilities - ABILITIES)}"
            )
        self.name = name
        self.domain = domain
        self.capabilities = abilities
        self.preprocessing = preprocessing
        self.loaded: dict[str, Any] = {}
        self._fingerprint: tuple[object, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Number of weights, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def precision(self) -> str:
        """The type that most weights have and compute in, such as ``float32``."""
        counts: dict[str, int] = {}
        for parameter in self.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
        return max(counts, key=counts.__getitem__)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, configuration and preprocessing; computed again only after a weight changed."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        state = (
            self.preprocessing,
            tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in tensors),
        )
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, self._hash(tensors))
        return self._fingerprint[1]

    def _hash(self, tensors: Sequence[tuple[str, Tensor]]) -> str:
        settings = {"kind": self.kind, "config": self.config, "preprocessing": self.preprocessing}
        digest = hashlib.sha256(json.dumps(settings, default=dataclasses.asdict, sort_keys=True).encode())
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def require(self, ability: str) -> None:
        """Raise unless the model has an ability.

        Raises:
            CapabilityError: It has not; the message names the model, its kind and what it can do.
        """
        if ability not in self.capabilities:
            self._lacks(ability)

    def _lacks(self, what: str) -> NoReturn:
        able = ", ".join(sorted(self.capabilities)) or "nothing beyond encoding"
        raise CapabilityError(
            f"model {self.name!r} of kind {self.kind!r} cannot {what} (it can: {able}); "
            "'vlm models list' shows what each model can do"
        )

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Encode preprocessed video (b, t, 3, h, w).

        Raises:
            CapabilityError: This kind of model cannot.
        """
        self._lacks("encode video")

    def encode_text(self, texts: list[str] | TokenBatch) -> TextFeatures:
        """Encode texts.

        Raises:
            CapabilityError: This kind of model cannot.
        """
        self._lacks("encode text")

    def similarity(self, videos: VideoFeatures | Tensor, texts: TextFeatures | Tensor) -> Tensor:
        """Return the inner products (videos, texts) of embeddings, in fp32, at temperature 1.

        Raises:
            CapabilityError: This kind of model has no space that texts and videos share.
        """
        self.require("search")
        left = videos.embedding if isinstance(videos, VideoFeatures) else videos
        right = texts.embedding if isinstance(texts, TextFeatures) else texts
        return left.float() @ right.float().T

    def match(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Score pairs with the matching head: (pairs, 2) logits, index 1 = match.

        Raises:
            CapabilityError: This kind of model has no matching head.
        """
        self._lacks("match")

    def masked_language_logits(self, input_ids: Tensor, mask: Tensor, video_tokens: Tensor) -> Tensor:
        """Predict the words at every position from the text and the video: (b, l, vocabulary).

        Raises:
            CapabilityError: This kind of model has no masked-language head.
        """
        self._lacks("predict masked words")

    def answer(
        self,
        video: Tensor,
        questions: Sequence[str],
        candidates: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> list[Answer]:
        """Answer questions about videos.

        Raises:
            CapabilityError: This kind of model cannot.
        """
        self._lacks("answer")

    @property
    def logit_scale(self) -> float | None:
        """None: this kind of model has no matching head."""
        return None

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of ``text`` that the model's vocabulary cannot express, in order.

        Raises:
            CapabilityError: This kind of model reads no text.
        """
        self._lacks("read text")


def mean_of_directions(frames: Tensor) -> Tensor:
    """Return the mean over frames of L2-normalised vectors (b, t, e) in fp32: (b, e), not renormalised.

    An inner product with it equals the mean of the per-frame cosines, which is the reference's score.
    """
    return F.normalize(frames.float(), dim=-1).mean(dim=1)
