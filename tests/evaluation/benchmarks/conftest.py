"""A tiny model that knows the words of the digit world."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
    from vlm.text import build_tokenizer
    from vlm.types import Preprocessing
    from vlm.world import vocabulary

    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(5)
    text = TextEncoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        dropout=0.0,
        width=32,
        num_layers=2,
        fusion_layer=1,
        num_heads=2,
        intermediate_width=64,
        max_positions=64,
        vision_width=32,
    )
    vision = VideoMambaConfig(width=32, depth=1, num_frames=8, image_size=64, patch_size=32)
    model = VideoTextModel(
        VideoTextConfig(vision=vision, text=text, embedding_width=16),
        tokenizer=tokenizer,
        preprocessing=Preprocessing(num_frames=8, image_size=64),
        name="tiny",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model.eval(), folder)
    return folder
