"""Models without a text side: the classifier, and the bare encoder of masked pretraining."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from vlm.models.video_mamba import VideoMamba, VideoMambaConfig
from vlm.models.video_model import VideoModel, mean_of_directions
from vlm.types import Preprocessing, VideoFeatures


def _without_pool_norm() -> VideoMambaConfig:
    return VideoMambaConfig(pool_norm=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """A bare encoder."""

    vision: VideoMambaConfig = field(default_factory=_without_pool_norm)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """An encoder and a linear head.

    Attributes:
        vision: Sizes of the encoder.
        num_classes: Rows of the head.
        reads: What the head reads: the class token, as published, or the ``mean`` of all other tokens.
        dropout: Rate in front of the head.
        class_names: What each row stands for; empty if nobody said.
    """

    vision: VideoMambaConfig = field(default_factory=_without_pool_norm)
    num_classes: int = 400
    reads: Literal["cls", "mean"] = "cls"
    dropout: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.reads not in ("cls", "mean"):
            raise ValueError(f"reads must be 'cls' or 'mean', got {self.reads!r}")
        if self.class_names and len(set(self.class_names)) != self.num_classes:
            raise ValueError(
                f"expected {self.num_classes} different class_names, got {len(set(self.class_names))}"
            )


class EncoderModel(VideoModel):
    """A video encoder alone."""

    kind: ClassVar[str] = "encoder"
    config: EncoderConfig | ClassifierConfig

    def __init__(
        self,
        config: EncoderConfig | ClassifierConfig,
        *,
        preprocessing: Preprocessing | None = None,
        name: str = "unnamed",
        domain: str = "open",
        capabilities: Collection[str] | None = None,
    ) -> None:
        super().__init__(
            preprocessing=preprocessing or preprocessing_of(config.vision),
            name=name,
            domain=domain,
            capabilities=capabilities,
        )
        self.config = config
        self.vision_encoder = VideoMamba(config.vision)

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Encode preprocessed video (b, t, 3, h, w); the embedding is the mean of pooled directions, (b, d).

        Raises:
            ValueError: Frames or size are not what the model was made for.
        """
        tokens = self.vision_encoder(video).tokens
        steps = self.config.vision.num_steps if video.shape[1] > 1 else 1
        pooled = self.vision_encoder.pool(tokens, steps)
        return VideoFeatures(tokens[:, 1:], pooled, mean_of_directions(pooled))


class Classifier(EncoderModel):
    """A video classifier: ``model(video)`` gives logits."""

    kind: ClassVar[str] = "classifier"
    default_capabilities: ClassVar[frozenset[str]] = frozenset({"classify"})
    config: ClassifierConfig

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        preprocessing: Preprocessing | None = None,
        name: str = "unnamed",
        domain: str = "open",
        capabilities: Collection[str] | None = None,
    ) -> None:
        usual = replace(preprocessing_of(config.vision), resize="bilinear", keep_aspect=True)
        super().__init__(
            config, preprocessing=preprocessing or usual, name=name, domain=domain, capabilities=capabilities
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.vision.width, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, video: Tensor) -> Tensor:
        """Return logits (b, classes) of preprocessed video (b, t, 3, h, w).

        Raises:
            ValueError: Frames or size are not what the model was made for.
        """
        return self.classify(self.vision_encoder(video).tokens)

    def classify(self, tokens: Tensor) -> Tensor:
        """Return logits (b, classes) in fp32 of the encoder's tokens (b, 1 + n, d), the class token first."""
        read = tokens[:, 0] if self.config.reads == "cls" else tokens[:, 1:].mean(dim=1)
        logits: Tensor = self.head(self.dropout(read))
        return logits.float()


def preprocessing_of(vision: VideoMambaConfig) -> Preprocessing:
    """Return the reference's preprocessing at an encoder's number of frames and size."""
    return Preprocessing(num_frames=vision.num_frames, image_size=vision.image_size)
