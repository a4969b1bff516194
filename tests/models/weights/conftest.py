import pytest
import torch

from vlm.models import (
    Classifier,
    ClassifierConfig,
    EncoderConfig,
    EncoderModel,
    TextEncoderConfig,
    VideoMambaConfig,
    VideoTextConfig,
    VideoTextModel,
)
from vlm.text import build_tokenizer

VISION = {"width": 32, "depth": 2, "num_frames": 4, "image_size": 28, "patch_size": 7, "state_size": 4}


@pytest.fixture
def free_models():
    """One small model of each kind that can be saved."""
    torch.manual_seed(5)
    tokenizer = build_tokenizer(["a red blue three moves left right"])
    text = TextEncoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        width=24,
        num_layers=2,
        fusion_layer=1,
        num_heads=2,
        intermediate_width=32,
        max_positions=16,
        vision_width=32,
    )
    config = VideoTextConfig(vision=VideoMambaConfig(**VISION), text=text, embedding_width=16)
    bare = VideoMambaConfig(**VISION, pool_norm=False)
    return {
        "video-text": VideoTextModel(config, tokenizer=tokenizer, name="small", domain="digit-world").eval(),
        "classifier": Classifier(ClassifierConfig(vision=bare, num_classes=3), name="sorter").eval(),
        "encoder": EncoderModel(EncoderConfig(vision=bare), name="eyes").eval(),
    }
