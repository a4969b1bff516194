"""A trained encoder to learn from, and configs that learn from it."""

from __future__ import annotations

import pytest
import torch

NO_TEXT = tuple(f"losses.{part}.weight=0" for part in ("contrastive", "matching", "masked_language"))


@pytest.fixture
def no_text():
    """Overrides that leave no loss which reads text."""
    return NO_TEXT


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a small encoder with random weights, of the tiny config's places."""
    from vlm.models import EncoderConfig, EncoderModel, VideoMambaConfig, save_model

    torch.manual_seed(11)
    vision = VideoMambaConfig(width=16, depth=2, num_frames=8, image_size=64, patch_size=16, state_size=4)
    return save_model(
        EncoderModel(EncoderConfig(vision=vision)), tmp_path_factory.mktemp("teacher") / "model"
    )


@pytest.fixture
def aligned(tiny, teacher):
    """Return a function that gives the tiny config with a masked alignment to ``teacher``."""

    def make(*overrides, text=True):
        return tiny(
            "model.vision.patch_size=16",
            "model.vision.alignment_width=16",
            "losses.alignment.weight=1",
            f"losses.alignment.teacher={teacher}",
            "losses.alignment.mask=tube",
            *(() if text else (*NO_TEXT, "evaluation.every=0")),
            *overrides,
        )

    return make
