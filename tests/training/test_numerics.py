"""What must stay in fp32 under bf16, what recomputation and compilation must not change."""

import pytest
import torch

from vlm.models.mamba_block import MambaBlock
from vlm.models.video_mamba import VideoMamba, VideoMambaConfig
from vlm.training.engine import PlainEngine
from vlm.training.loop import build
from vlm.training.schedule import is_decayed
from vlm.training.setup import make_model, make_tokenizer
from vlm.training.sources.opening import open_source

CPU = torch.device("cpu")
# torch's own compiler imports what torch deprecates
DEPRECATED = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def coarse(tiny, tmp_path):
    """A state in bf16, and a batch."""
    config = tiny("train.precision=bf16")
    state = build(config, tmp_path, CPU)
    with open_source(config, state.model, 0) as batches:
        return state, next(batches)


def test_weights_gradients_and_averages_stay_fp32_under_bf16(coarse):
    state, batch = coarse
    state.update([batch], 0, 0)
    engine = state.engine
    assert isinstance(engine, PlainEngine)
    for name, parameter in state.module.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    moments = [t for each in engine._optimizer.state.values() for t in each.values()]
    assert {tensor.dtype for tensor in (*moments, *state.average.values)} == {torch.float32}


def test_products_run_in_bf16_but_the_residual_and_the_dynamics_do_not(coarse):
    state, batch = coarse
    seen = []

    def note(block, inputs, output):
        seen.append((output[0].dtype, output[1].dtype))

    scans = []
    for block in state.model.vision_encoder.layers:
        assert isinstance(block, MambaBlock)
        block.register_forward_hook(note)
        mixer = block.mixer
        scans += [mixer.A_log, mixer.A_b_log, mixer.D, mixer.D_b, mixer.dt_proj.bias, mixer.dt_proj_b.bias]
    state.module(batch, 0)[0].backward()
    assert seen == [(torch.bfloat16, torch.float32)] * 2
    assert all(tensor.dtype == tensor.grad.dtype == torch.float32 for tensor in scans)


def test_temperature_tables_norms_and_dynamics_are_not_decayed(tiny):
    config = tiny()
    names = {
        name
        for name, p in make_model(config, make_tokenizer(config), CPU).named_parameters()
        if is_decayed(name, p)
    }
    for part in ("temp", "A_log", "A_b_log", ".D", "D_b", "bias", "norm", "pos", "cls_token", "embeddings.w"):
        assert not any(part in name and "_proj.weight" not in name for name in names), part


@DEPRECATED
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_encoder_is_one_graph_with_the_same_numbers(recompute):
    torch.manual_seed(0)
    config = VideoMambaConfig(
        width=32, depth=2, num_frames=4, image_size=64, patch_size=32, activation_checkpointing=recompute
    )
    encoder, video = VideoMamba(config).train(), torch.randn(2, 4, 3, 64, 64)

    def run():
        encoder.zero_grad()
        tokens = encoder(video).tokens
        tokens.square().mean().backward()
        return [tokens.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]

    expected = run()
    encoder.compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@DEPRECATED
def test_the_encoder_is_compiled_where_the_config_says_so(tiny):
    for option, expected in (("false", False), ("true", True)):
        config = tiny(f"train.compile={option}")
        model = make_model(config, make_tokenizer(config), CPU)
        assert (model.vision_encoder._compiled_call_impl is not None) == expected
