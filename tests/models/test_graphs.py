"""What a replayed encoder must get right around the graph; the encoder itself plays a recording here."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from vlm.models import graphs
from vlm.models.graphs import GraphedEncoder, Recording
from vlm.models.video_mamba import EncoderOutput, VideoMamba, VideoMambaConfig


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = VideoMambaConfig(
        width=16, depth=2, num_frames=2, image_size=32, alignment_width=8, alignment_layers=1
    )
    return VideoMamba(config).eval()


@pytest.fixture
def recorded(monkeypatch):
    """Let CPU tensors pass for CUDA ones; return the shapes that were recorded, in order."""
    shapes = []

    def record(encoder, video, _pool):
        shapes.append(tuple(video.shape))
        frames = video.clone()
        output = encoder(frames)
        weights = [parameter.data for parameter in encoder.parameters()]  # as a graph: these, come what may

        def replay():
            present = [parameter.data for parameter in encoder.parameters()]
            for parameter, data in zip(encoder.parameters(), weights, strict=True):
                parameter.data = data
            new = encoder(frames)
            for parameter, data in zip(encoder.parameters(), present, strict=True):
                parameter.data = data
            for place, value in zip(
                (output.tokens, *output.alignment), (new.tokens, *new.alignment), strict=True
            ):
                place.copy_(value)

        return Recording(frames, output, replay)

    stream = SimpleNamespace(wait_event=lambda _event: None, record_event=lambda: None)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return shapes


def clips(*shape):
    return torch.randn(*shape, 3, 32, 32)


def same(found: EncoderOutput, expected: EncoderOutput):
    assert torch.equal(found.tokens, expected.tokens)
    assert all(map(torch.equal, found.alignment, expected.alignment))


@torch.no_grad()
def test_one_recording_serves_all_inputs_of_a_shape(encoder, recorded):
    graphed = GraphedEncoder(encoder)
    inputs = [clips(1, 2), clips(1, 2), clips(2, 2), clips(1, 1), clips(1, 2)]
    outputs = [graphed(video) for video in inputs]  # all kept: none may be overwritten by a later one
    for video, output in zip(inputs, outputs, strict=True):
        same(output, encoder(video))
    assert recorded == [(1, 2, 3, 32, 32), (2, 2, 3, 32, 32), (1, 1, 3, 32, 32)]


@torch.no_grad()
def test_weights_changed_in_place_are_seen_and_moved_ones_recorded_anew(encoder, recorded):
    graphed, video = GraphedEncoder(encoder), clips(1, 2)
    before = graphed(video)
    encoder.layers[0].mixer.in_proj.weight.mul_(2)
    after = graphed(video)
    assert len(recorded) == 1 and not torch.equal(before.tokens, after.tokens)
    same(after, encoder(video))
    encoder.load_state_dict({k: v + 0.1 for k, v in encoder.state_dict().items()}, assign=True)
    same(graphed(video), encoder(video))
    assert len(recorded) == 2


@torch.no_grad()
def test_a_replaced_module_is_recorded_anew(encoder, recorded):
    graphed, video = GraphedEncoder(encoder), clips(1, 2)
    graphed(video)
    mixer = encoder.layers[1].mixer
    mixer.out_proj = torch.nn.Sequential(mixer.out_proj, torch.nn.Tanh())
    same(graphed(video), encoder(video))
    assert len(recorded) == 2


@torch.no_grad()
def test_hooks_run(encoder, recorded):
    graphed, called = GraphedEncoder(encoder), []
    graphed(clips(1, 2))
    encoder.layers[0].register_forward_hook(lambda *_: called.append(1))
    graphed(clips(1, 2))
    assert called and len(recorded) == 1


def test_gradients_training_masks_and_large_batches_go_to_the_encoder(encoder, recorded):
    graphed = GraphedEncoder(encoder, largest_stream=2 * 9 * 16)
    assert graphed(clips(1, 2)).tokens.requires_grad
    with torch.no_grad():
        mask = torch.tensor([[True, False] * 4])
        assert graphed(clips(1, 2), mask).tokens.shape[1] == 5
        graphed(clips(3, 2))
        assert not recorded
        graphed(clips(2, 2))
        assert len(recorded) == 1
        encoder.train()
        graphed(clips(1, 2))
    assert len(recorded) == 1


@torch.no_grad()
def test_the_shape_unused_for_longest_is_forgotten(encoder, recorded):
    graphed = GraphedEncoder(encoder, most_shapes=2)
    for batch in (1, 2, 1, 3, 1, 2):
        graphed(clips(batch, 2))
    assert [shape[0] for shape in recorded] == [1, 2, 3, 2]


@torch.no_grad()
def test_each_autocast_type_has_a_recording(encoder, recorded, monkeypatch):
    graphed, dtype = GraphedEncoder(encoder), [None]
    monkeypatch.setattr(graphs, "_autocast_dtype", lambda: dtype[0])
    for dtype[0] in (None, torch.bfloat16, None):
        graphed(clips(1, 2))
    assert len(recorded) == 2


def test_a_copy_has_its_own_encoder_and_no_recordings(encoder, recorded):
    graphed, video = GraphedEncoder(encoder, largest_stream=9 * 16), clips(1, 2)
    with torch.no_grad():
        graphed(video)
        other = copy.deepcopy(graphed)
        other.encoder.pos_embed.add_(1)
        same(other(video), other.encoder(video))
        same(graphed(video), encoder(video))
        assert len(recorded) == 2
        other(clips(2, 2))
        assert len(recorded) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_graph_on_a_gpu(encoder):
    encoder.cuda()
    graphed = GraphedEncoder(encoder)
    for _ in range(3):
        video = clips(1, 2).cuda()
        same(graphed(video), encoder(video))


def test_without_cuda_nothing_is_recorded(encoder):
    video, graphed = clips(1, 2), GraphedEncoder(encoder)
    with torch.no_grad():
        same(graphed(video), encoder(video))
    assert not graphed._recordings
