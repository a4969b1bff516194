from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm.errors import CapabilityError
from vlm.retrieval.embedding import FeatureLayout, choose_layout, encode_segments, pool_tokens
from vlm.retrieval.vector_log import quantise
from vlm.types import VideoFeatures


@pytest.mark.parametrize(("side", "pool"), [(4, 2), (7, 2), (7, 3), (5, 5), (3, 1), (14, 2)])
def test_pooling_is_the_mean_of_each_square(side: int, pool: int) -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 3 * side * side, 5)).astype(np.float32)
    pooled = pool_tokens(tokens, 3, pool)
    across = -(-side // pool)
    assert pooled.shape == (2, 3 * across * across, 5)
    grid = tokens.reshape(2, 3, side, side, 5)
    for row in range(across):
        for column in range(across):
            square = grid[:, :, row * pool : (row + 1) * pool, column * pool : (column + 1) * pool]
            mine = pooled.reshape(2, 3, across, across, 5)[:, :, row, column]
            np.testing.assert_allclose(mine, square.mean(axis=(2, 3)), atol=1e-6)


def test_tokens_that_form_no_grid_stay() -> None:
    tokens = np.ones((1, 7, 2), np.float32)
    assert pool_tokens(tokens, 1, 2).shape == tokens.shape


@pytest.mark.parametrize("spread", [1e-12, 1e-3, 1.0, 3e4])
def test_eight_bits_lose_half_a_step_at_most(spread: float) -> None:
    tokens = (np.random.default_rng(1).standard_normal((3, 11, 16)) * spread).astype(np.float32)
    tokens[0, 0] = 0
    block = quantise(tokens)
    assert block.values.dtype == np.int8 and block.scale is not None and block.scale.dtype == np.float16
    step = block.scale.astype(np.float32)[..., None]
    assert (np.abs(block.restore() - tokens) <= step * 0.5001).all()
    # the scale is the largest number over 127, up to float16's rounding: 1 in 1024, at least 6e-8
    largest = np.abs(tokens).max(axis=2)
    assert (step[..., 0] <= largest / 127 * (1 + 2**-10) + 2**-23).all()


class Shapes:
    """A model of which only the shapes matter."""

    name, kind, domain, fingerprint, device = "shapes", "video-text", "open", "f", torch.device("cpu")

    def __init__(self, side: int, width: int, frames: int = 8, capabilities=("search", "rerank")) -> None:
        from vlm.types import Preprocessing

        self.side, self.width = side, width
        self.preprocessing = Preprocessing(num_frames=frames, image_size=16)
        self.capabilities = frozenset(capabilities)

    def encode_video(self, video):
        b, t = video.shape[:2]
        tokens = torch.ones(b, t * self.side**2, self.width)
        return VideoFeatures(tokens, torch.ones(b, t, self.width), torch.ones(b, 6))


@pytest.mark.parametrize(
    ("side", "width", "stride_s", "pool"),
    [
        (14, 576, 4.0, 2),
        (14, 192, 4.0, 2),
        (14, 576, 2.0, 3),
        (16, 1024, 1.0, 8),
        (1, 64, 4.0, 1),
        (4, 96, 4.0, 2),
    ],
)
def test_pooled_tokens_stay_below_60_kb_a_second(side, width, stride_s, pool) -> None:
    layout = choose_layout(Shapes(side, width), None, stride_s)
    assert (layout.store_tokens, layout.token_pool, layout.dim) == ("pooled", pool, 6)
    vectors, tokens = encode_segments(Shapes(side, width), [np.zeros((8, 3, 16, 16), np.float32)] * 2, layout)
    assert vectors.shape == (2, 6) and vectors.dtype == np.float16
    stored = tokens.values.nbytes + tokens.scale.nbytes
    assert stored == 2 * layout.token_bytes
    assert layout.token_bytes / stride_s <= 60_000


def test_full_and_no_tokens() -> None:
    clips = [np.zeros((8, 3, 16, 16), np.float32)]
    full = choose_layout(Shapes(4, 10), "full", 4.0)
    _, tokens = encode_segments(Shapes(4, 10), clips, full)
    assert tokens.values.shape == (1, 128, 10) and tokens.values.dtype == np.float16 and tokens.scale is None
    assert full.token_bytes == tokens.values.nbytes
    none = choose_layout(Shapes(4, 10), "none", 4.0)
    assert none == FeatureLayout(dim=6, store_tokens="none", token_pool=1, num_tokens=0, token_dim=0)
    assert encode_segments(Shapes(4, 10), clips, none)[1] is None


def test_what_a_model_cannot_do_is_said() -> None:
    assert choose_layout(Shapes(4, 10, capabilities=["search"]), None, 4.0).store_tokens == "none"
    with pytest.raises(CapabilityError, match="cannot rerank.*--store-tokens none"):
        choose_layout(Shapes(4, 10, capabilities=["search"]), "pooled", 4.0)
    with pytest.raises(CapabilityError, match=r"'shapes' \(video-text\) cannot search"):
        choose_layout(Shapes(4, 10, capabilities=["classify"]), None, 4.0)
