"""Models: the video encoder, the text side, their assembly, and how weights get in and out."""

from vlm.models.classifier import Classifier, ClassifierConfig, EncoderConfig, EncoderModel
from vlm.models.masking import make_mask
from vlm.models.text_encoder import TextEncoder, TextEncoderConfig
from vlm.models.video_mamba import VideoMamba, VideoMambaConfig, sized
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextConfig, VideoTextModel
from vlm.models.weights import LoadReport, from_official, load_model, save_model
from vlm.types import TokenBatch

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
