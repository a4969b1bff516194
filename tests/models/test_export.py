"""The encoder in other people's hands: exported, under autocast, run twice."""

from __future__ import annotations

import io

import pytest
import torch
from torch.export import Dim, export, load, save

from vlm.models import VideoMamba, VideoMambaConfig

SMALL = {"width": 32, "depth": 2, "num_frames": 4, "image_size": 28, "patch_size": 7, "state_size": 4}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return VideoMamba(VideoMambaConfig(**SMALL, init="mamba", time_std=0.5)).eval()


class Tokens(torch.nn.Module):
    """What a user exports: a file of a program holds tensors and plain containers, no named tuples."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, video):
        return self.encoder(video).tokens


def test_an_exported_encoder_survives_a_file_and_takes_any_batch(encoder):
    video = torch.randn(3, 4, 3, 28, 28)
    program = export(Tokens(encoder), (video[:2],), dynamic_shapes={"video": {0: Dim("batch")}})
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    found = load(file).module()(video)
    assert found.shape == (3, 65, 32)
    assert torch.equal(found, encoder(video).tokens)


def gradients(encoder, video, dtype=None):
    """Tokens and gradients, under autocast if a dtype is given."""
    encoder.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        tokens = encoder(video).tokens
    (tokens.float() * torch.linspace(-1, 1, 32)).sum().backward()
    return tokens.detach(), {
        name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None
    }


def test_twice_is_the_same_to_the_bit(encoder):
    torch.set_num_threads(2)
    video = torch.randn(2, 4, 3, 28, 28)
    (tokens, found), (again, repeated) = gradients(encoder, video), gradients(encoder, video)
    assert torch.equal(tokens, again) and len(found) > 30
    assert all(torch.equal(found[name], repeated[name]) for name in found)


def test_autocast_rounds_products_and_keeps_weights_and_gradients_fp32(encoder, relative):
    video = torch.randn(2, 4, 3, 28, 28)
    expected, slopes = gradients(encoder, video)
    tokens, found = gradients(encoder, video, torch.bfloat16)
    assert 0 < relative(tokens, expected) < 2e-2
    assert found.keys() == slopes.keys()
    assert {p.dtype for p in encoder.parameters()} == {g.dtype for g in found.values()} == {torch.float32}
    whole, rounded = (torch.cat([g.flatten() for g in grads.values()]) for grads in (slopes, found))
    assert relative(rounded, whole) < 5e-2


@pytest.fixture
def relative():
    return lambda found, expected: ((found.float() - expected).norm() / expected.norm()).item()
