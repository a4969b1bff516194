"""Models: the video encoder, the text side, their assembly, and how weights get in and out.

The names below are loaded at first use: the registry of models is here too, and listing it needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.models.classifier import Classifier, ClassifierConfig, EncoderConfig, EncoderModel
    from vlm.models.masking import make_mask
    from vlm.models.text_encoder import TextEncoder, TextEncoderConfig
    from vlm.models.video_mamba import VideoMamba, VideoMambaConfig, sized
    from vlm.models.video_model import VideoModel
    from vlm.models.video_text_model import VideoTextConfig, VideoTextModel
    from vlm.models.weights import LoadReport, from_official, load_model, save_model
    from vlm.types import TokenBatch

_HOMES = {
    "Classifier": "vlm.models.classifier",
    "ClassifierConfig": "vlm.models.classifier",
    "EncoderConfig": "vlm.models.classifier",
    "EncoderModel": "vlm.models.classifier",
    "LoadReport": "vlm.models.weights",
    "TextEncoder": "vlm.models.text_encoder",
    "TextEncoderConfig": "vlm.models.text_encoder",
    "TokenBatch": "vlm.types",
    "VideoMamba": "vlm.models.video_mamba",
    "VideoMambaConfig": "vlm.models.video_mamba",
    "VideoModel": "vlm.models.video_model",
    "VideoTextConfig": "vlm.models.video_text_model",
    "VideoTextModel": "vlm.models.video_text_model",
    "from_official": "vlm.models.weights",
    "load_model": "vlm.models.weights",
    "make_mask": "vlm.models.masking",
    "save_model": "vlm.models.weights",
    "sized": "vlm.models.video_mamba",
}

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "EncoderConfig",
    "EncoderModel",
    "LoadReport",
    "TextEncoder",
    "TextEncoderConfig",
    "TokenBatch",
    "VideoMamba",
    "VideoMambaConfig",
    "VideoModel",
    "VideoTextConfig",
    "VideoTextModel",
    "from_official",
    "load_model",
    "make_mask",
    "save_model",
    "sized",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm.models' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
