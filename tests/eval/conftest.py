"""A small world on disk, and a tiny model folder with random weights."""

from __future__ import annotations

import json

import pytest

NUM_PAIRS = 10


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory):
    from vlm import world
    from vlm.world.clips import write_clips

    folder = tmp_path_factory.mktemp("world")
    write_clips(list(world.gallery("val", 11, NUM_PAIRS, twins=True)), folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
    from vlm.text import build_tokenizer
    from vlm.types import Preprocessing
    from vlm.world import vocabulary

    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(5)
    config = VideoTextConfig(
        vision=VideoMambaConfig(width=32, depth=2, num_frames=8, image_size=64, patch_size=32),
        text=TextEncoderConfig(
            vocabulary_size=tokenizer.vocabulary_size,
            dropout=0.0,
            width=32,
            num_layers=2,
            fusion_layer=1,
            num_heads=2,
            intermediate_width=64,
            max_positions=64,
            vision_width=32,
        ),
        embedding_width=16,
    )
    model = VideoTextModel(
        config,
        tokenizer=tokenizer,
        preprocessing=Preprocessing(num_frames=8, image_size=64),
        name="tiny",
        domain="digit-world",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model.eval(), folder)
    return folder


def _figures(section):
    """Every value of a measure below a section of a card, with the ends of its interval."""
    if not isinstance(section, dict):
        return set()
    own = {section[key] for key in ("value", "low", "high") if isinstance(section.get(key), float)}
    return own.union(*map(_figures, section.values()))


@pytest.fixture(scope="session")
def on_the_page():
    """Assert that a card's page holds every figure of some sections exactly; return the page."""

    def check(card_path, *sections):
        card = json.loads(card_path.read_text(encoding="utf-8"))
        page = card_path.with_suffix(".html").read_text(encoding="utf-8")
        figures = set().union(*(_figures(card[name]) for name in sections))
        assert figures and not [value for value in figures if f'value="{value!r}"' not in page]
        return page

    return check
